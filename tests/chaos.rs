//! The chaos runner: a mesh of real processes under load, faults, and what must
//! hold all the same. docs/reliability.md has the figures and says how to read
//! a run. Short here; `MOEMESH_CHAOS_LONG=1 cargo test --release --test chaos --
//! --nocapture --test-threads 1` is the long form.

#[path = "chaos/collector.rs"]
mod collector;
#[path = "chaos/device.rs"]
mod device;
#[path = "chaos/etcd.rs"]
mod etcd;
#[path = "chaos/fetch.rs"]
mod fetch;
#[path = "chaos/history.rs"]
mod history;
#[path = "chaos/inflict.rs"]
mod inflict;
#[path = "chaos/load.rs"]
mod load;
#[path = "chaos/meta.rs"]
mod meta;
#[path = "chaos/network.rs"]
mod network;
#[path = "chaos/observe.rs"]
mod observe;
#[path = "chaos/offices.rs"]
mod offices;
#[path = "chaos/overload.rs"]
mod overload;
#[path = "chaos/panics.rs"]
mod panics;
#[path = "chaos/processes.rs"]
mod processes;
#[path = "chaos/quota.rs"]
mod quota;
#[path = "chaos/run.rs"]
mod run;
#[path = "chaos/scenario.rs"]
mod scenario;
#[allow(dead_code, unused_imports, reason = "the other target needs the rest")]
mod support;
