//! What an authority writes, and what it refuses.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::certs::show::describe;

/// A directory that is removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("certs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn owner(role: Role, id: &str) -> Owner {
    Owner { role, id: Some(id.to_owned()) }
}

#[test]
fn an_authority_issues_what_processes_accept_also_when_opened_again() {
    let dir = Dir::new("issue");
    let made = Authority::create(&dir.0.join("a/b"), "prod", 100, false).unwrap();
    let opened = Authority::open(&dir.0.join("a/b")).unwrap();
    for (authority, id) in [(&made, "n-0"), (&opened, "n-1")] {
        for role in Role::ALL {
            let id = format!("{role}-{id}");
            let issued = authority.issue(role, &id, 30, false).unwrap();
            assert_eq!(issued.principal.to_string(), format!("spiffe://prod/{role}/{id}"));
            assert_eq!(mode(&issued.files.key), 0o600);
            let loaded = Tls::load(&issued.files, owner(role, &id)).unwrap();
            assert_eq!(loaded.principal(), issued.principal);
            let told = describe(&issued.files.certificate).unwrap();
            assert!(told.contains(&issued.principal.to_string()), "{told}");
            assert!(told.contains("30 days") || told.contains("29 days"), "{told}");
        }
    }
    assert_eq!((mode(&made.key()), mode(&dir.0.join("a/b"))), (0o600, 0o700));
    let told = describe(&made.certificate()).unwrap();
    assert!(told.contains("the authority of mesh prod"), "{told}");
    let left: Vec<_> =
        fs::read_dir(dir.0.join("a/b")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 2 + 2 * 8, "no drafts are left: {left:?}");
}

#[test]
fn nothing_is_replaced_unless_told() {
    let dir = Dir::new("force");
    let authority = Authority::create(&dir.0, "m", 10, false).unwrap();
    let again = Authority::create(&dir.0, "m", 10, false).err().unwrap().to_string();
    assert!(again.contains("ca.pem is there already: give --force"), "{again}");
    let first = authority.issue(Role::Router, "r", 10, false).unwrap();
    let before = fs::read(&first.files.certificate).unwrap();
    let refused = authority.issue(Role::Router, "r", 10, false).unwrap_err().to_string();
    assert!(refused.contains("r.pem is there already"), "{refused}");
    assert_eq!(fs::read(&first.files.certificate).unwrap(), before);
    authority.issue(Role::Router, "r", 10, true).unwrap();
    assert_ne!(fs::read(&first.files.certificate).unwrap(), before);

    Authority::create(&dir.0, "m", 10, true).unwrap();
    let stale = Tls::load(&first.files, owner(Role::Router, "r")).unwrap_err().to_string();
    assert!(stale.contains("authority that is not in tls_ca"), "{stale}");
}

#[test]
fn what_cannot_be_is_said() {
    let dir = Dir::new("wrong");
    let missing = Authority::open(&dir.0).err().unwrap().to_string();
    assert!(missing.contains("no authority in") && missing.contains("certs init"), "{missing}");
    assert!(Authority::create(&dir.0, "Not A Mesh", 1, false).is_err());
    let authority = Authority::create(&dir.0, "m", 10, false).unwrap();
    for (id, want) in
        [("ca", "the authority's own"), ("a/b", "an id is made of"), ("", "an id has")]
    {
        let refused = authority.issue(Role::Router, id, 1, false).unwrap_err().to_string();
        assert!(refused.contains(want), "{refused}");
    }
    // No certificate outlives the authority.
    let issued = authority.issue(Role::Router, "r", 1000, false).unwrap();
    assert_eq!(issued.until, authority.until());

    // Another authority's key: what it would sign is worth nothing.
    let other = Dir::new("other");
    Authority::create(&other.0, "m", 10, false).unwrap();
    fs::copy(other.0.join(KEY), dir.0.join(KEY)).unwrap();
    let mixed = Authority::open(&dir.0).unwrap().issue(Role::Router, "x", 1, false);
    let mixed = mixed.unwrap_err().to_string();
    assert!(mixed.contains("authority that is not in tls_ca"), "{mixed}");
    assert!(!dir.0.join("x.pem").exists());

    let not = describe(&dir.0.join(KEY)).unwrap_err().to_string();
    assert!(not.contains("holds no certificate"), "{not}");
    assert!(describe(&dir.0.join("missing")).unwrap_err().to_string().contains("cannot read"));
}
