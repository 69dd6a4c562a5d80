//! Which store a URL and the environment name, and a client for it.

use std::cmp::Reverse;
use std::env;
use std::sync::{Arc, Once};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use serde_json::Value;

use super::failure::{self, Failure, Result};
use super::profile::{variable, Profile};
use super::seal::Keys;

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Amazon,
    Google,
    Azure,
}

pub struct Address {
    pub kind: Kind,
    pub bucket: String,
    pub prefix: Path,
}

impl Address {
    /// A URL that is none of ours is not repeated: it may hold a password.
    pub fn parse(url: &str) -> Result<Self> {
        let unknown = || {
            Failure::invalid(
                "the URL of a remote store is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, without \
                 a user, a port or a query",
            )
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(unknown)?;
        let kind = match scheme {
            "s3" => Kind::Amazon,
            "gs" => Kind::Google,
            "az" => Kind::Azure,
            _ => return Err(unknown()),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let named = !bucket.is_empty() && bucket.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._".contains(&c));
        if !named || prefix.contains(['?', '#', '@']) {
            return Err(unknown());
        }
        let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| unknown())?;
        Ok(Self { kind, bucket: bucket.into(), prefix })
    }
}

#[derive(Clone)]
pub struct Options {
    pub request_timeout: Duration,
    connect_timeout: Duration,
    retries: usize,
    pub retry_timeout: Duration,
    bulk: bool, // who asks bounds the time of a request by its bytes
}

impl Options {
    /// And the keys that objects are sealed with.
    pub fn parse(json: &str) -> Result<(Self, Option<Keys>)> {
        let mut options = Self {
            request_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
            retries: 10,
            retry_timeout: Duration::from_secs(60),
            bulk: false,
        };
        if json.is_empty() {
            return Ok((options, None));
        }
        let bad = |what: &str| Failure::invalid(format!("the options of a remote store: {what}"));
        let Ok(Value::Object(mut members)) = serde_json::from_str(json) else { return Err(bad("no JSON object")) };
        let keys = match members.remove("seal") {
            Some(seal) => Some(keys_of(&seal).unwrap_or_else(|| Err(bad("'seal' has no keys")))?),
            None => None,
        };
        for (name, value) in members {
            let number = value.as_u64().ok_or_else(|| bad(&format!("'{name}' is no whole number")))?;
            let time = Duration::from_millis(number);
            match name.as_str() {
                "request_timeout_ms" => options.request_timeout = time,
                "connect_timeout_ms" => options.connect_timeout = time,
                "retries" => options.retries = number as usize,
                "retry_timeout_ms" => options.retry_timeout = time,
                _ => return Err(bad(&format!("there is no '{name}'"))),
            }
        }
        Ok((options, keys))
    }

    pub fn of_bulk(&self) -> Self {
        Self { bulk: true, ..self.clone() }
    }

    fn client(&self, endpoint: Option<&str>) -> ClientOptions {
        let options = ClientOptions::new();
        if self.bulk { options.with_timeout_disabled() } else { options.with_timeout(self.request_timeout) }
            .with_connect_timeout(self.connect_timeout)
            .with_allow_http(endpoint.is_some_and(|url| url.starts_with("http://")))
    }

    fn retry(&self) -> RetryConfig {
        let mut retry =
            RetryConfig { max_retries: self.retries, retry_timeout: self.retry_timeout, ..RetryConfig::default() };
        // The last wait may end later than the retries.
        retry.backoff.max_backoff = retry.backoff.max_backoff.min(self.retry_timeout / 4);
        retry.backoff.init_backoff = retry.backoff.init_backoff.min(retry.backoff.max_backoff);
        retry
    }
}

/// None: it is not {"keys": [...], "names": "..."}.
fn keys_of(seal: &Value) -> Option<Result<Keys>> {
    let texts: Option<Vec<_>> = seal.get("keys")?.as_array()?.iter().map(Value::as_str).collect();
    Some(Keys::new(&texts?, seal.get("names")?.as_str()?))
}

/// The client, and the texts that no sentence may repeat.
pub fn client(address: &Address, options: &Options) -> Result<(Arc<dyn ObjectStore>, Vec<String>)> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let mut secrets = secrets_of_environment();
    let built = match address.kind {
        Kind::Amazon => amazon(address, options, &mut secrets)?,
        Kind::Google => google(address, options)?,
        Kind::Azure => azure(address, options)?,
    };
    secrets.sort_by_key(|secret| Reverse(secret.len())); // one may hold another
    let store = built.map_err(|e| {
        let why = failure::cause(&e, &secrets);
        Failure::invalid(format!("the settings of the remote store can't be used: {why}"))
    })?;
    Ok((store, secrets))
}

type Built = object_store::Result<Arc<dyn ObjectStore>>;

fn amazon(address: &Address, options: &Options, secrets: &mut Vec<String>) -> Result<Built> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&address.bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_disable_bulk_delete(true); // objects are removed one by one, which every store can
    let profile = Profile::read()?;
    let others = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SECRET_ACCESS_KEY", "AWS_SKIP_SIGNATURE"];
    if variable("AWS_ACCESS_KEY_ID").is_none() && others.iter().all(|name| variable(name).is_none()) {
        for (key, value) in [
            (AmazonS3ConfigKey::AccessKeyId, profile.access_key_id),
            (AmazonS3ConfigKey::SecretAccessKey, profile.secret_access_key),
            (AmazonS3ConfigKey::Token, profile.session_token),
        ] {
            if let Some(value) = value {
                secrets.push(value.clone());
                builder = builder.with_config(key, value);
            }
        }
    }
    if let (None, Some(region)) = (builder.get_config_value(&AmazonS3ConfigKey::Region), profile.region) {
        builder = builder.with_region(region);
    }
    let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL")).or(profile.endpoint_url);
    let endpoint = checked(endpoint)?;
    if let Some(endpoint) = &endpoint {
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    let builder = builder.with_client_options(options.client(endpoint.as_deref())).with_retry(options.retry());
    Ok(builder.build().map(|store| Arc::new(store) as _))
}

fn google(address: &Address, options: &Options) -> Result<Built> {
    let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&address.bucket);
    let endpoint = checked(builder.get_config_value(&GoogleConfigKey::BaseUrl))?;
    let builder = builder.with_client_options(options.client(endpoint.as_deref())).with_retry(options.retry());
    Ok(builder.build().map(|store| Arc::new(store) as _))
}

fn azure(address: &Address, options: &Options) -> Result<Built> {
    let builder = MicrosoftAzureBuilder::from_env().with_container_name(&address.bucket);
    let endpoint = checked(builder.get_config_value(&AzureConfigKey::Endpoint))?;
    let builder = builder.with_client_options(options.client(endpoint.as_deref())).with_retry(options.retry());
    Ok(builder.build().map(|store| Arc::new(store) as _))
}

/// An endpoint that is a URL without a user, whose password would be told in errors.
fn checked(endpoint: Option<String>) -> Result<Option<String>> {
    match &endpoint {
        Some(url) if !(url.starts_with("http://") || url.starts_with("https://")) || url.contains(['@', '?']) => {
            Err(Failure::invalid(
                "the endpoint of the remote store is no http:// or https:// URL without a user and a query",
            ))
        }
        _ => Ok(endpoint),
    }
}

/// The values of variables that the clients read and that are, by their names, credentials.
fn secrets_of_environment() -> Vec<String> {
    let secret = |name: &str| {
        ["AWS_", "AZURE_", "GOOGLE_"].iter().any(|prefix| name.starts_with(prefix))
            && ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD"].iter().any(|word| name.contains(word))
            && !name.ends_with("_FILE")
    };
    let variables =
        env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, value)| secret(name) && value.len() >= 4).map(|(_, value)| value).collect()
}
