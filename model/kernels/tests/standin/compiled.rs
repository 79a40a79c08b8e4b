//! The stand-in as a library, and how it is told where a tensor lies.

use std::path::Path;
use std::process::Command;

use kernels::cuda::{TensorMap, Tiled};
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

/// A tensor map as standin.h reads it.
pub fn tensor_map(tensor: &Tiled) -> TensorMap {
    let rank = tensor.sizes.len();
    let mut map = [0; 16];
    map[0] = tensor.address;
    map[1] = rank as u64;
    map[2] = tensor.element.size();
    map[3] = u64::from(tensor.swizzled);
    map[4..4 + rank].copy_from_slice(&tensor.sizes);
    map[7..6 + rank].copy_from_slice(&tensor.strides);
    for (to, from) in map[9..].iter_mut().zip(&tensor.tile) {
        *to = u64::from(*from);
    }
    TensorMap::of_words(map)
}
