//! The stand-in as a library.

use std::path::Path;
use std::process::Command;

use libloading::Library;

/// `source`, a file beside this one, with the kernels that it includes; nothing where there is no C++ compiler.
pub fn compiled(source: &str) -> Option<Library> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Tests of the model have it, too.
    let root = [here.to_owned(), here.join("kernels")]
        .into_iter()
        .find(|root| root.join("tests/standin").is_dir())
        .unwrap();
    let out = std::env::temp_dir().join(format!("moemesh-{source}-{}.so", std::process::id()));
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]);
    command.args(["-ffp-contract=off", "-fPIC", "-shared"]);
    command.arg("-I").arg(root.join("src/cuda")).arg("-I").arg(root.join("tests/standin"));
    command.arg("-o").arg(&out);
    let output = match command.arg(root.join("tests/standin").join(source)).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: no C++ compiler: {error}");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}");
    // SAFETY: what was just built; it has no initialisers but those of plain values.
    let library = unsafe { Library::new(&out) }.unwrap();
    std::fs::remove_file(out).unwrap();
    Some(library)
}
