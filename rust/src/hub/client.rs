//! Requests to the hub.

use std::sync::Once;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, RANGE};
use reqwest::{Response, StatusCode, Url};

use super::listing::{Listing, RemoteFile};
use super::{fail, Result, FAILED, NOT_FOUND};
use crate::abi::{Failure, STATUS_INVALID};

/// A repository of a hundred thousand files has a shorter description.
const MAX_LISTING: usize = 64 << 20;

pub struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: String,
    repo: String,
}

impl Client {
    pub fn new(endpoint: &str, token: &str, repo: &str) -> Result<Self> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let endpoint = Url::parse(endpoint).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        let Some(endpoint) = endpoint else {
            return fail(STATUS_INVALID, "HF_ENDPOINT is no http:// or https:// URL without a user and a query");
        };
        let http = reqwest::Client::builder()
            .user_agent(concat!("torpor/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            .build();
        let http = http.or_else(|e| fail(FAILED, format!("can't make a client of the hub: {}", innermost(e))))?;
        Ok(Self { http, endpoint, token: token.into(), repo: repo.into() })
    }

    /// `endpoint/parts...`, each part escaped.
    fn url(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(parts);
        }
        url
    }

    /// The token goes to the endpoint; where that sends on to another host, the client leaves it out.
    async fn get(&self, url: Url, from: u64) -> Result<Response> {
        let mut request = self.http.get(url);
        if !self.token.is_empty() {
            request = request.header(AUTHORIZATION, format!("Bearer {}", self.token));
        }
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        request.send().await.map_err(|e| self.lost(e))
    }

    fn lost(&self, error: reqwest::Error) -> Failure {
        let host = self.endpoint.host_str().unwrap_or_default();
        let connecting = error.is_connect();
        let cause = innermost(error);
        let sentence = if connecting {
            format!("{host} can't be reached ({cause}); check the network, or name a model directory that is here")
        } else {
            format!("the connection to {host} failed ({cause}); the next try goes on from what has come")
        };
        Failure { status: FAILED, sentence }
    }

    fn refused(&self, status: StatusCode, what: &str) -> Failure {
        let repo = &self.repo;
        let (status, sentence) = match status.as_u16() {
            401 => (
                NOT_FOUND,
                format!(
                    "there is no {repo} for {}; check the name, and HF_TOKEN where it is private",
                    if self.token.is_empty() { "those without a token" } else { "this token" }
                ),
            ),
            403 => (
                FAILED,
                format!(
                    "{repo} is not open to this token; accept its terms on {} first",
                    self.url(&repo.split('/').collect::<Vec<_>>())
                ),
            ),
            404 => (NOT_FOUND, format!("there is no {what}")),
            429 => (FAILED, "the hub asks for fewer requests (429); try again later, or set HF_TOKEN".into()),
            other => (FAILED, format!("the hub can't give {what} now ({other}); try again later")),
        };
        Failure { status, sentence }
    }

    pub async fn list(&self, revision: &str) -> Result<Listing> {
        let mut parts = vec!["api", "models"];
        parts.extend(self.repo.split('/'));
        parts.extend(["revision", revision]);
        let mut url = self.url(&parts);
        url.set_query(Some("blobs=true"));
        let what = format!("{} at '{revision}' on the hub", self.repo);
        let mut response = self.get(url, 0).await?;
        if !response.status().is_success() {
            return Err(self.refused(response.status(), &what));
        }
        let mut text = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|e| self.lost(e))? {
            text.extend_from_slice(&bytes);
            if text.len() > MAX_LISTING {
                return fail(FAILED, format!("the description of {what} has no end; check HF_ENDPOINT"));
            }
        }
        Listing::parse(&text)
    }

    /// The file's bytes from `from` on, or from its beginning: the second value says from where.
    pub async fn open(&self, commit: &str, file: &RemoteFile, from: u64) -> Result<(Response, u64)> {
        let mut parts: Vec<&str> = self.repo.split('/').collect();
        parts.extend(["resolve", commit]);
        parts.extend(file.name.split('/'));
        let response = self.get(self.url(&parts), from).await?;
        match response.status() {
            StatusCode::OK => Ok((response, 0)),
            StatusCode::PARTIAL_CONTENT if begins_at(&response, from) => Ok((response, from)),
            status => Err(self.refused(status, &format!("'{}' of {}", file.name, self.repo))),
        }
    }

    pub async fn chunk(&self, response: &mut Response) -> Result<Option<impl AsRef<[u8]>>> {
        response.chunk().await.map_err(|e| self.lost(e))
    }
}

/// Whether a partial answer is what was asked for.
fn begins_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

/// What all others were caused by, without a URL: its query may be a key.
fn innermost(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut last: &(dyn std::error::Error + 'static) = &error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string().split_whitespace().collect::<Vec<_>>().join(" ").chars().take(200).collect()
}
