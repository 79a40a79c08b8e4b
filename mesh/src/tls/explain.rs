//! Failed handshakes in people's words. Both ends have to say what is wrong, and
//! most of what a library says means nothing to whoever mixed up two files.

use std::error::Error;
use std::io;

use rustls::{CertificateError, Error as Tls, InvalidMessage};

/// What HTTP/2 says to a client that has to encrypt (RFC 9113, section 7).
pub(super) const NOT_ENCRYPTED: &str =
    "it accepts only mutual TLS: set tls_cert, tls_key and tls_ca";

/// Says why a connection failed, if TLS or the lack of it was the cause.
pub fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<Tls>() {
            return Some(describe(error));
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            if error.reason() == Some(h2::Reason::INADEQUATE_SECURITY) {
                return Some(NOT_ENCRYPTED.to_owned());
            }
            if let Some(told) = error.get_io().and_then(explain_io) {
                return Some(told);
            }
        }
        if let Some(told) = error.downcast_ref::<io::Error>().and_then(explain_io) {
            return Some(told);
        }
        cause = error.source();
    }
    None
}

/// An IO error's `source` is its cause's cause, and HTTP/2 keeps only the text.
fn explain_io(error: &io::Error) -> Option<String> {
    if error.kind() == io::ErrorKind::UnexpectedEof && error.to_string().contains("close_notify") {
        return Some("the connection was cut off".to_owned());
    }
    let inner: &(dyn Error + 'static) = error.get_ref()?;
    explain(inner).or_else(|| Some(alert(inner.to_string().strip_prefix(ALERT)?)))
}

/// How the library's message on an alert begins; the alert's name follows.
const ALERT: &str = "received fatal alert: ";

fn describe(error: &Tls) -> String {
    match error {
        Tls::InvalidCertificate(error) => certificate(error),
        Tls::NoCertificatesPresented => "it presents no certificate".to_owned(),
        Tls::AlertReceived(received) => alert(&format!("{received:?}")),
        Tls::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS: set tls_cert, tls_key and tls_ca there too".to_owned()
        }
        other => other.to_string(),
    }
}

/// What the other end thinks of this one's certificate (RFC 8446, section 6.2).
fn alert(name: &str) -> String {
    let why = match name {
        "CertificateExpired" => "has expired, says the other end",
        // The second: of one that has the same name as a trusted one.
        "UnknownCA" | "DecryptError" => "is of an authority that the other end does not trust",
        "CertificateRequired" => "is required by the other end",
        "BadCertificate" | "CertificateUnknown" | "AccessDenied" | "UnsupportedCertificate" => {
            "is refused by the other end, whose log says why"
        }
        _ => return format!("the other end refuses the handshake: {name}"),
    };
    format!("this process's certificate {why}")
}

fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::ExpiredContext { time, not_after } => {
            let ago = time.as_secs().saturating_sub(not_after.as_secs());
            format!("its certificate expired {} ago", duration(ago))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let ahead = not_before.as_secs().saturating_sub(time.as_secs());
            format!("its certificate is valid only in {}: compare the clocks", duration(ahead))
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is of an authority that is not in tls_ca".to_owned()
        }
        CertificateError::Other(refused) => refused.0.to_string(),
        other => format!("its certificate is refused: {other}"),
    }
}

/// A length of time, to its largest unit.
pub fn duration(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use rustls::AlertDescription;

    use super::*;

    #[test]
    fn the_cause_is_found_beneath_other_errors() {
        let inner = Tls::AlertReceived(AlertDescription::UnknownCA);
        let nested = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, inner));
        let told = explain(&nested).unwrap();
        assert!(told.contains("authority that the other end does not trust"), "{told}");
        let as_text = Tls::AlertReceived(AlertDescription::CertificateExpired).to_string();
        let told = explain(&io::Error::other(as_text)).unwrap();
        assert!(told.contains("has expired"), "{told}");
        assert_eq!(explain(&io::Error::from(io::ErrorKind::ConnectionRefused)), None);
        assert_eq!(explain(&io::Error::other("something else")), None);
    }

    #[test]
    fn times_are_told_to_their_largest_unit() {
        let told = [0, 1, 90, 120, 7300, 200_000].map(duration);
        assert_eq!(told, ["0 seconds", "1 second", "90 seconds", "2 minutes", "2 hours", "2 days"]);
    }
}
