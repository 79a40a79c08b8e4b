//! The sandbox: a mesh of real processes, its HTTP client, and the fixtures.
//! Two test targets share it, and each needs its part.

pub mod certs;
pub mod dice;
pub mod etcd;
pub mod evil;
pub mod faultproxy;
pub mod fixture;
pub mod http;
pub mod netns;
pub mod process;
pub mod sandbox;
pub mod up;

pub use fixture::{FIXTURES, Fixture, tiny};
pub use sandbox::Sandbox;
pub use up::Up;

/// Runs an async test body on its own runtime.
pub fn block_on<T>(body: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(body)
}
