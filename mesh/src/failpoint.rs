//! Places where a test has a part panic, to see that it is rebuilt or that its
//! process ends. Debug builds only: a release build contains none, which
//! `tests/chaos` checks.

/// Panics if the directory named by `FAILPOINTS_DIR` holds a file called `name`,
/// once for each time it is put there.
#[cfg(debug_assertions)]
pub fn pass(name: &str) {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();
    let dir = DIR.get_or_init(|| std::env::var_os("FAILPOINTS_DIR").map(PathBuf::from));
    // Whoever removes the file is hit, if several pass at once.
    if let Some(dir) = dir
        && std::fs::remove_file(dir.join(name)).is_ok()
    {
        panic!("failpoint {name}, as told");
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_: &str) {}
