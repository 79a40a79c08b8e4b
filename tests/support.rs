//! The sandbox: a mesh of real processes, its HTTP client, and the fixtures.

pub mod evil;
pub mod fixture;
pub mod http;
pub mod sandbox;

pub use fixture::{FIXTURES, Fixture, tiny};
pub use sandbox::Sandbox;

/// Runs an async test body on its own runtime.
pub fn block_on<T>(body: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(body)
}
