//! What tests of GPU kernels on the CPU share: the stand-in compiled, numbers, rows widened.

use std::path::Path;
use std::process::Command;

use half::bf16;
use libloading::Library;

/// `source`, a file beside this one, with the kernels that it includes; nothing where there is no C++ compiler.
pub fn compiled(source: &str) -> Option<Library> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
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

/// Numbers that are the same for a seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % end
    }

    /// In -1..1.
    pub fn unit(&mut self) -> f32 {
        self.below(20_001) as f32 / 10_000.0 - 1.0
    }
}

pub fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}
