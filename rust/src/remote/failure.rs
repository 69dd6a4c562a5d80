//! What went wrong with a request, as a status and one sentence that holds no credentials.

use std::error::Error as _;
use std::iter::successors;

use object_store::client::{HttpError, HttpErrorKind};
use object_store::Error;

pub use crate::abi::Failure;

pub const NOT_FOUND: i32 = 3;
pub const PRECONDITION: i32 = 4;
pub const REFUSED: i32 = 5;
pub const UNKNOWN: i32 = 6;
pub const CANCELLED: i32 = 7;
pub const SHORT: i32 = 8;
pub const NO_BUCKET: i32 = 9;
pub const LARGE: i32 = 10;
pub const DAMAGED: i32 = 11;
pub const INCOMPATIBLE: i32 = 12;

pub type Result<T> = std::result::Result<T, Failure>;

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
    fn find(error: &Error, secrets: &[String]) -> Option<Self> {
        let text = causes(error).map(|cause| cause.to_string()).find(|text| text.starts_with(ANSWERED))?;
        let answer = &text[ANSWERED.len()..];
        let status = answer.get(..3)?.parse().ok()?;
        let told = |name| line(element(answer, name), secrets);
        Some(Self { status, code: told("Code"), message: told("Message") })
    }

    fn told(&self) -> String {
        let code = if self.code.is_empty() { String::new() } else { format!(" {}", self.code) };
        if self.message.is_empty() {
            format!("{}{code}", self.status)
        } else {
            format!("{}{code}: {}", self.status, self.message)
        }
    }
}

/// The text of the first element `name`.
fn element<'a>(xml: &'a str, name: &str) -> &'a str {
    xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once('<')).map_or("", |(text, _)| text)
}

/// `text` with stars for each secret.
pub fn hidden(text: &str, secrets: &[String]) -> String {
    secrets.iter().fold(text.to_string(), |text, secret| text.replace(secret.as_str(), "***"))
}

/// `text` as a part of a sentence. It is cut last: a secret that is cut is no longer found.
fn line(text: &str, secrets: &[String]) -> String {
    let text = hidden(text, secrets).split_whitespace().collect::<Vec<_>>().join(" ");
    text.trim_end_matches('.').chars().take(MAX_TOLD).collect()
}

/// The error that all others were caused by, as a part of a sentence.
pub fn cause(error: &(dyn std::error::Error + 'static), secrets: &[String]) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    line(&last.to_string(), secrets)
}

/// Whether one of the causes tells of `what`.
fn tells(error: &Error, what: &str) -> bool {
    causes(error).any(|cause| cause.to_string().contains(what))
}

/// Whether the client sent the request more than once. It does so after connections that broke and statuses of 5xx.
fn retried(error: &Error) -> bool {
    causes(error).any(|cause| {
        let text = cause.to_string();
        text.split_once(ANSWERED).map_or(text.as_str(), |(about, _)| about).contains(" retries, max_retries: ")
    })
}

/// The machine's own service for credentials, which is asked last, was asked and did not help.
fn lacks_credentials(error: &Error) -> bool {
    ["169.254.169.254", "metadata.google.internal"].iter().any(|host| tells(error, host))
}

/// A refusal tells of the last try alone: an earlier one may have been applied.
fn of_all_tries(error: &Error, last: Failure) -> Failure {
    if matches!(last.status, REFUSED | NO_BUCKET) && retried(error) && !lacks_credentials(error) {
        let sentence = format!("an earlier try may have been applied, and the last one failed: {}", last.sentence);
        return Failure { status: UNKNOWN, sentence };
    }
    last
}

/// As `of`, for a put. `conditional`: it has a condition.
pub fn of_put(error: &Error, conditional: bool, secrets: &[String]) -> Failure {
    // S3 says 409 while another put of the object is under way: nothing is known of it then. Azure says so of one that
    // is there.
    let under_way = Answer::find(error, secrets).is_some_and(|a| a.status == 409 && a.code != "BlobAlreadyExists");
    let holds_not = matches!(error, Error::AlreadyExists { .. } | Error::Precondition { .. }) && !under_way;
    if conditional && holds_not {
        return Failure { status: PRECONDITION, sentence: "its condition does not hold".into() };
    }
    let last = match of(error, secrets) {
        gone if gone.status == NOT_FOUND => Failure { status: NO_BUCKET, ..gone },
        other => other,
    };
    of_all_tries(error, last)
}

/// As `of`, for a removal.
pub fn of_removal(error: &Error, secrets: &[String]) -> Failure {
    of_all_tries(error, of(error, secrets))
}

/// Status and reason of a request that failed; the sentence is the reason alone.
pub fn of(error: &Error, secrets: &[String]) -> Failure {
    let failure = |status, sentence: String| Failure { status, sentence };
    if let Error::InvalidPath { source } = error {
        return failure(REFUSED, format!("the store names an object so: {source}"));
    }
    if lacks_credentials(error) {
        return failure(
            REFUSED,
            "there are no credentials: none in the environment or its files, and no metadata service answers".into(),
        );
    }
    if tells(error, "Received redirect without LOCATION") {
        return failure(REFUSED, "the bucket is elsewhere; check the region and the endpoint".into());
    }
    if let Some(answer) = Answer::find(error, secrets) {
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
                format!("the store can't be reached ({}); check the endpoint and the network", cause(error, secrets)),
            ),
            _ => failure(UNKNOWN, format!("the connection failed ({}); try again", cause(error, secrets))),
        };
    }
    failure(UNKNOWN, format!("the store's answer is of no use ({})", cause(error, secrets)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_is_cut_is_hidden_as_a_whole() {
        let secret = format!("{}==", "t0ken".repeat(80));
        let secrets = [secret.clone()];
        for padding in [0, 150, 199, 300] {
            let padding = "x".repeat(padding);
            let body = format!("403 Forbidden: <Code>No</Code><Message>{padding} {secret} {secret}.</Message>");
            let source = std::io::Error::other(format!("{ANSWERED}{body}")).into();
            let denied = Error::Generic { store: "S3", source };
            let other =
                Error::Generic { store: "S3", source: std::io::Error::other(format!("{padding} {secret}")).into() };
            for error in [denied, other] {
                let sentence = of(&error, &secrets).sentence;
                assert!(!sentence.contains("t0k") && sentence.len() < 400, "{sentence}");
            }
        }
    }

    #[test]
    fn a_conflict_with_a_put_that_is_under_way_says_nothing_of_the_object() {
        let answered = |status: &str| {
            let source = std::io::Error::other(format!("{ANSWERED}{status}")).into();
            Error::AlreadyExists { path: "x".into(), source: Box::new(Error::Generic { store: "S3", source }) }
        };
        let conflict = answered("409 Conflict: <Code>ConditionalRequestConflict</Code>");
        let azure = answered("409 Conflict: <Code>BlobAlreadyExists</Code>");
        assert_eq!(of_put(&conflict, true, &[]).status, UNKNOWN);
        assert_eq!(of_put(&azure, true, &[]).status, PRECONDITION);
        assert_eq!(of_put(&answered("412 Precondition Failed: "), true, &[]).status, PRECONDITION);
    }

    #[test]
    fn a_refusal_after_retries_leaves_open_whether_the_write_was_applied() {
        let refused = |retries: &str| Error::Generic {
            store: "S3",
            source: Box::new(Wrapped(
                format!("Error performing PUT http://x/y in 1s{retries} - {ANSWERED}403 Forbidden: no"),
                std::io::Error::other(format!("{ANSWERED}403 Forbidden: after 9 retries, max_retries: 9")),
            )),
        };
        let (once, again) = (refused(""), refused(", after 2 retries, max_retries: 10, retry_timeout: 60s "));
        assert_eq!(of_put(&once, true, &[]).status, REFUSED);
        assert_eq!(of_removal(&once, &[]).status, REFUSED);
        assert_eq!(of(&again, &[]).status, REFUSED);
        assert_eq!(of_put(&again, true, &[]).status, UNKNOWN);
        assert_eq!(of_put(&again, false, &[]).status, UNKNOWN);
        assert_eq!(of_removal(&again, &[]).status, UNKNOWN);
    }

    /// As object_store's error of retries, which others can't make.
    #[derive(Debug)]
    struct Wrapped(String, std::io::Error);
    impl std::fmt::Display for Wrapped {
        fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            out.write_str(&self.0)
        }
    }
    impl std::error::Error for Wrapped {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.1)
        }
    }
}
