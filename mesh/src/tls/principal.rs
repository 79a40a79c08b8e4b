//! Who a certificate says its holder is: a mesh, a role in it and an id, as a
//! SPIFFE ID in the certificate's one URI name, `spiffe://<mesh>/<role>/<id>`.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

const SCHEME: &str = "spiffe://";
/// The longest mesh name (a SPIFFE trust domain) and the longest id.
const LONGEST_PART: usize = 255;

/// What a certificate allows its holder to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Gateway,
    Router,
    ExpertNode,
    /// A person or a program that runs the mesh: `moemesh status`, `drain` and the like.
    Operator,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::Gateway, Self::Router, Self::ExpertNode, Self::Operator];

    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Router => "router",
            Self::ExpertNode => "expert-node",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{text}` is no role; roles are {names}")
        })
    }
}

/// One identity of one mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal {
    pub mesh: String,
    pub role: Role,
    pub id: String,
}

/// Why a certificate names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrincipalError {
    #[error("it is not a certificate: {0}")]
    Certificate(String),
    #[error("its certificate has no URI name spiffe://<mesh>/<role>/<id>")]
    Nameless,
    #[error("its certificate has more than one URI name")]
    Ambiguous,
    #[error("`{uri}` is not spiffe://<mesh>/<role>/<id>: {problem}")]
    Uri { uri: String, problem: String },
}

impl Principal {
    /// # Errors
    /// A part that a SPIFFE ID cannot hold.
    pub fn new(mesh: &str, role: Role, id: &str) -> Result<Self, PrincipalError> {
        let refused =
            |problem| PrincipalError::Uri { uri: format!("{SCHEME}{mesh}/{role}/{id}"), problem };
        check_mesh(mesh).map_err(refused)?;
        check_id(id).map_err(refused)?;
        Ok(Self { mesh: mesh.to_owned(), role, id: id.to_owned() })
    }

    /// Reads the certificate's one URI name. Its signature is not checked here.
    ///
    /// # Errors
    /// It has none, several, or one of another kind.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, PrincipalError> {
        uri_of(certificate)?.parse()
    }

    /// `router/router-0`, for messages within one mesh.
    pub fn short(&self) -> String {
        format!("{}/{}", self.role, self.id)
    }
}

/// The mesh that a certificate authority signs for: its URI name without a path.
///
/// # Errors
/// It has none, several, or one of another kind.
pub fn mesh_of_authority(certificate: &CertificateDer<'_>) -> Result<String, PrincipalError> {
    let uri = uri_of(certificate)?;
    let refused = |problem| PrincipalError::Uri { uri: uri.clone(), problem };
    let mesh = uri
        .strip_prefix(SCHEME)
        .ok_or_else(|| refused("an authority's name is spiffe://<mesh>".to_owned()))?;
    check_mesh(mesh).map_err(refused)?;
    Ok(mesh.to_owned())
}

/// How an authority's certificate names its mesh.
pub fn authority_uri(mesh: &str) -> String {
    format!("{SCHEME}{mesh}")
}

fn uri_of(certificate: &CertificateDer<'_>) -> Result<String, PrincipalError> {
    let parsed = EndEntityCert::try_from(certificate)
        .map_err(|error| PrincipalError::Certificate(error.to_string()))?;
    let mut uris = parsed.valid_uri_names();
    let uri = uris.next().ok_or(PrincipalError::Nameless)?;
    match uris.next() {
        Some(_) => Err(PrincipalError::Ambiguous),
        None => Ok(uri.to_owned()),
    }
}

impl FromStr for Principal {
    type Err = PrincipalError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let refused = |problem: String| PrincipalError::Uri {
            // Whoever is not trusted does not fill our logs.
            uri: uri.chars().take(LONGEST_PART).collect(),
            problem,
        };
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| refused("another scheme".to_owned()))?;
        let mut parts = rest.split('/');
        let (Some(mesh), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(refused("expected a mesh, a role and an id".to_owned()));
        };
        let role: Role = role.parse().map_err(&refused)?;
        check_mesh(mesh).map_err(&refused)?;
        check_id(id).map_err(&refused)?;
        Ok(Self { mesh: mesh.to_owned(), role, id: id.to_owned() })
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.mesh, self.role, self.id)
    }
}

fn check_mesh(mesh: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c);
    check("a mesh's name", mesh, "lower-case letters, digits, `.`, `-` and `_`", fits)
}

fn check_id(id: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    check("an id", id, "letters, digits, `.`, `-` and `_`", fits)
}

fn check(what: &str, text: &str, of: &str, fits: fn(char) -> bool) -> Result<(), String> {
    if text.is_empty() || text.len() > LONGEST_PART {
        return Err(format!("{what} has 1 to {LONGEST_PART} characters"));
    }
    if text == "." || text == ".." {
        return Err(format!("{what} is not `{text}`"));
    }
    if text.chars().all(fits) { Ok(()) } else { Err(format!("{what} is made of {of}")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_identity_reads_back_as_itself() {
        for role in Role::ALL {
            let principal = Principal::new("prod-1.example", role, "Node_0.a-b").unwrap();
            assert_eq!(principal.to_string().parse::<Principal>().unwrap(), principal);
            assert_eq!(role.name().parse::<Role>().unwrap(), role);
        }
        let text = Principal::new("m", Role::ExpertNode, "7").unwrap().to_string();
        assert_eq!(text, "spiffe://m/expert-node/7");
    }

    #[test]
    fn what_is_no_identity_is_refused_with_the_reason() {
        for (uri, want) in [
            ("", "another scheme"),
            ("https://m/router/a", "another scheme"),
            ("SPIFFE://m/router/a", "another scheme"),
            ("spiffe://m/router", "expected a mesh, a role and an id"),
            ("spiffe://m/router/a/b", "expected a mesh, a role and an id"),
            ("spiffe://m/router/", "an id has 1 to 255 characters"),
            ("spiffe:///router/a", "a mesh's name has 1 to 255 characters"),
            ("spiffe://M/router/a", "lower-case"),
            ("spiffe://u@m:1/router/a", "lower-case"),
            ("spiffe://m/admin/a", "`admin` is no role; roles are gateway, router"),
            ("spiffe://m/router/..", "an id is not `..`"),
            ("spiffe://m/router/a?b", "an id is made of"),
            ("spiffe://m/router/a%2Fb", "an id is made of"),
            ("spiffe://m/router/a\n", "an id is made of"),
        ] {
            let error = uri.parse::<Principal>().unwrap_err().to_string();
            assert!(error.contains(want), "{uri:?}: {error}");
        }
        assert!(Principal::new("m", Role::Router, "a b").is_err());
        assert!(Principal::new("m", Role::Router, &"a".repeat(256)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(uri in ".*") {
            if let Ok(principal) = uri.parse::<Principal>() {
                prop_assert_eq!(principal.to_string(), uri);
            }
        }

        #[test]
        fn text_of_our_shape_is_read_or_refused(
            uri in "spiffe://[a-zA-Z.%/-]{0,6}/(router|gateway|x)/[a-z./\u{e9}-]{0,6}",
        ) {
            if let Ok(principal) = uri.parse::<Principal>() {
                prop_assert_eq!(principal.to_string(), uri);
            }
        }

        #[test]
        fn any_bytes_are_no_reason_to_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let certificate = CertificateDer::from(bytes);
            prop_assert!(Principal::of(&certificate).is_err());
            prop_assert!(mesh_of_authority(&certificate).is_err());
        }
    }
}
