//! What went wrong with a request, as a status and one sentence that holds no credentials.

use std::error::Error as _;
use std::iter::successors;

use object_store::client::{HttpError, HttpErrorKind};
use object_store::Error;

use crate::abi::{Invalid, STATUS_INVALID};

pub const NOT_FOUND: i32 = 3;
pub const PRECONDITION: i32 = 4;
pub const REFUSED: i32 = 5;
pub const UNKNOWN: i32 = 6;
pub const CANCELLED: i32 = 7;
pub const SHORT: i32 = 8;
pub const NO_BUCKET: i32 = 9;

pub struct Failure {
    pub status: i32,
    pub sentence: String,
}
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub fn invalid(sentence: impl Into<String>) -> Self {
        Self { status: STATUS_INVALID, sentence: sentence.into() }
    }
}

impl From<Invalid> for Failure {
    fn from(Invalid(sentence): Invalid) -> Self {
        Self::invalid(sentence)
    }
}

/// object_store keeps the type of its request errors to itself; their text begins so, then come status and body.
const ANSWERED: &str = "Server returned non-2xx status code: ";
/// Longer texts of a store are cut.
const MAX_TOLD: usize = 200;

fn causes(error: &Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    successors(error.source(), |&cause| cause.source())
}

/// An answer that is an error: S3, Google and Azure say `<Code>` and `<Message>` in XML.
struct Answer {
    status: u16,
    code: String,
    message: String,
}

impl Answer {
    fn find(error: &Error) -> Option<Self> {
        let text = causes(error).map(|cause| cause.to_string()).find(|text| text.starts_with(ANSWERED))?;
        let answer = &text[ANSWERED.len()..];
        let status = answer.get(..3)?.parse().ok()?;
        Some(Self { status, code: element(answer, "Code"), message: element(answer, "Message") })
    }

    fn told(&self) -> String {
        let code = if self.code.is_empty() { String::new() } else { format!(" {}", self.code) };
        let message = self.message.trim_end_matches('.');
        if message.is_empty() {
            format!("{}{code}", self.status)
        } else {
            format!("{}{code}: {message}", self.status)
        }
    }
}

/// The text of the first element `name`, on one line.
fn element(xml: &str, name: &str) -> String {
    let text =
        xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once('<')).map_or("", |(text, _)| text);
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_TOLD).collect()
}

/// The error that all others were caused by, as a part of a sentence.
pub fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let text: String = last.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    text.trim_end_matches('.').chars().take(MAX_TOLD).collect()
}

/// Whether one of the causes tells of `what`.
fn tells(error: &Error, what: &str) -> bool {
    causes(error).any(|cause| cause.to_string().contains(what))
}

/// Status and reason of a request that failed; the sentence is the reason alone. `conditional`: a put with a condition.
pub fn of(error: &Error, conditional: bool) -> Failure {
    let failure = |status, sentence: String| Failure { status, sentence };
    match error {
        Error::AlreadyExists { .. } | Error::Precondition { .. } if conditional => {
            return failure(PRECONDITION, "its condition does not hold".into());
        }
        Error::InvalidPath { source } => return failure(REFUSED, format!("the store names an object so: {source}")),
        _ => {}
    }
    if ["169.254.169.254", "metadata.google.internal"].iter().any(|host| tells(error, host)) {
        // The machine's own service for credentials is asked last.
        return failure(
            REFUSED,
            "there are no credentials: none in the environment or its files, and no metadata service answers".into(),
        );
    }
    if tells(error, "Received redirect without LOCATION") {
        return failure(REFUSED, "the bucket is elsewhere; check the region and the endpoint".into());
    }
    if let Some(answer) = Answer::find(error) {
        let told = answer.told();
        return match answer.status {
            404 if answer.code == "NoSuchBucket" || answer.code == "ContainerNotFound" => {
                failure(NO_BUCKET, format!("there is no such bucket ({told}); create it"))
            }
            404 => failure(NOT_FOUND, format!("there is no such object ({told})")),
            416 => failure(SHORT, format!("the object is shorter ({told})")),
            401 | 403 => {
                failure(REFUSED, format!("access is denied ({told}); check the credentials and what they allow"))
            }
            300..=399 => {
                failure(REFUSED, format!("the bucket is elsewhere ({told}); check the region and the endpoint"))
            }
            408 | 409 | 429 | 500.. => failure(UNKNOWN, format!("the store can't do it now ({told}); try again later")),
            _ => failure(REFUSED, format!("the store refused it ({told})")),
        };
    }
    if let Some(http) = causes(error).find_map(|cause| cause.downcast_ref::<HttpError>()) {
        return match http.kind() {
            HttpErrorKind::Timeout => {
                failure(UNKNOWN, "no answer came in time; check the network, or try again later".into())
            }
            HttpErrorKind::Connect => failure(
                UNKNOWN,
                format!("the store can't be reached ({}); check the endpoint and the network", cause(error)),
            ),
            _ => failure(UNKNOWN, format!("the connection failed ({}); try again", cause(error))),
        };
    }
    failure(UNKNOWN, format!("the store's answer is of no use ({})", cause(error)))
}
