//! Places where a test has a part panic, or a device be lost, to see that it is
//! rebuilt or that its process ends. Debug builds only: a release build contains
//! none, which `tests/chaos` checks.

/// Whether the directory named by `FAILPOINTS_DIR` holds a file called `name`;
/// once for each time it is put there.
#[cfg(debug_assertions)]
fn is_told(name: &str) -> bool {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();
    let dir = DIR.get_or_init(|| std::env::var_os("FAILPOINTS_DIR").map(PathBuf::from));
    // Whoever removes the file is hit, if several pass at once.
    dir.as_ref().is_some_and(|dir| std::fs::remove_file(dir.join(name)).is_ok())
}

/// Never.
#[cfg(not(debug_assertions))]
#[inline(always)]
fn is_told(_: &str) -> bool {
    false
}

/// Panics, if told to.
#[inline(always)]
pub fn pass(name: &str) {
    if is_told(name) {
        panic!("failpoint {name}, as told");
    }
}

/// # Errors
/// `error`, if told to.
#[inline(always)]
pub fn fail<E>(name: &str, error: impl FnOnce() -> E) -> Result<(), E> {
    if is_told(name) { Err(error()) } else { Ok(()) }
}
