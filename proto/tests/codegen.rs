//! The committed code under `src/gen` is what the `.proto` files generate.
//! `UPDATE=1 cargo test -p proto --test codegen` rewrites it.

use std::path::Path;

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = std::env::temp_dir().join(format!("moemesh-codegen-{}", std::process::id()));
    std::fs::create_dir_all(&out).unwrap();

    let sources = ["mesh/v1/expert.proto", "mesh/v1/inference.proto", "mesh/v1/operations.proto"];
    let files = protox::compile(sources, [root]).unwrap();
    tonic_prost_build::configure()
        .out_dir(&out)
        .bytes(".")
        .file_descriptor_set_path(out.join("moemesh.v1.descriptor.bin"))
        .compile_fds(files.clone())
        .unwrap();
    std::fs::write(out.join("moemesh.v1.descriptor.bin"), prost::Message::encode_to_vec(&files))
        .unwrap();

    for name in ["moemesh.v1.rs", "moemesh.v1.descriptor.bin"] {
        let fresh = std::fs::read(out.join(name)).unwrap();
        let committed = root.join("src/gen").join(name);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&committed, &fresh).unwrap();
        }
        assert!(
            std::fs::read(&committed).unwrap_or_default() == fresh,
            "{} is stale: run `UPDATE=1 cargo test -p proto --test codegen`",
            committed.display()
        );
    }
    std::fs::remove_dir_all(out).unwrap();
}
