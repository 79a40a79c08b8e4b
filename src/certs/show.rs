//! One file of certificates in words: whose each is, until when, and what its
//! holder may call.

use std::fmt::Write as _;
use std::path::Path;

use mesh::authz::{METHODS, check};
use mesh::tls::{
    Principal, PrincipalError, TlsError, Validity, certificates, duration, mesh_of_authority,
};
use time::OffsetDateTime;

/// Describes every certificate of the file.
///
/// # Errors
/// It cannot be read or holds none.
pub fn describe(file: &Path) -> Result<String, TlsError> {
    let mut text = format!("{}\n", file.display());
    for certificate in certificates(file)? {
        // Writing to a String cannot fail.
        let _ = match (Principal::of(&certificate), mesh_of_authority(&certificate)) {
            (Ok(principal), _) => {
                let may = METHODS.iter().map(|(method, _)| *method);
                let may: Vec<&str> = may.filter(|name| check(&principal, name).is_ok()).collect();
                let (Principal { mesh, role, id }, may) = (&principal, may.join("\n             "));
                writeln!(
                    text,
                    "  identity   {principal}\n  mesh       {mesh}\n  role       {role}\n  id         {id}\n  may call   {may}"
                )
            }
            (_, Ok(mesh)) => writeln!(text, "  identity   the authority of mesh {mesh}"),
            (Err(PrincipalError::Nameless), _) => {
                writeln!(text, "  identity   none of a mesh: it has no URI name")
            }
            (Err(error), _) => writeln!(text, "  identity   none of a mesh: {error}"),
        };
        let _ = match Validity::of(&certificate) {
            Some(validity) => {
                let (from, to) = (date(validity.not_before), date(validity.not_after));
                let left = validity.not_after - OffsetDateTime::now_utc().unix_timestamp();
                let about = match u64::try_from(left) {
                    Ok(left) => format!("{} left", duration(left)),
                    Err(_) => format!("expired {} ago", duration(left.unsigned_abs())),
                };
                writeln!(text, "  valid      {from} to {to}, {about}")
            }
            None => writeln!(text, "  valid      its dates are unreadable"),
        };
    }
    Ok(text)
}

fn date(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds)
        .map_or_else(|_| "?".to_owned(), |time| time.date().to_string())
}
