# The one door: `just` lists what there is.
default:
    @just --list

# Start a mesh on the bundled model
up *args:
    cargo run --release -- up {{args}}

# Everything that continuous integration runs
check:
    ./tests/run

# What needs Rust only
test *args:
    cargo test --workspace {{args}}

fmt:
    cargo fmt --all

lint:
    cargo clippy --workspace --all-targets -- -D warnings

# Licences, duplicates, sources (needs cargo-deny)
deny:
    cargo deny check licenses bans sources

# Regenerate proto/src/gen after editing proto/mesh
proto:
    UPDATE=1 cargo test -p proto --test codegen

# The table of README.md
bench:
    cargo run --release -- bench serve

# Kernels against the machine's limits
ladder:
    cargo bench -p kernels --bench ladder
