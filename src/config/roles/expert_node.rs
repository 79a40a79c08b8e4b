//! The keys of an expert node.

use ::expert_node::device::Device;
use mesh::transport::Endpoint;
use model::gpu::GpuBudget;

use super::{
    Process, Role, RoleConfig, admin, first_cpu, id, isa, listen, model_dir, numerics, shared_rows,
    telemetry, threads,
};
use crate::config::ConfigError;
use crate::config::reader::Reader;
use crate::config::{etcd, tls};

pub(super) fn expert_node(reader: &mut Reader<'_>) -> Result<Process, ConfigError> {
    let id = id(reader, "expert-node-0")?;
    let listen = listen(reader, "127.0.0.1:7100")?;
    let (tls, insecure) = tls::files_of_server(reader, &listen)?;
    let etcd = etcd::etcd(reader, tls.as_ref(), insecure)?;
    let join: Vec<Endpoint> = reader.or(
        "join",
        Vec::new(),
        "Routers of a running mesh that the node joins, host:port or unix:/path: all of them.",
    )?;
    let joins = !join.is_empty() || etcd.is_some();
    let advertise = etcd::advertise(reader, &listen, joins)?;
    let config = ::expert_node::Config {
        id,
        admin: admin(reader)?,
        tls,
        listen,
        model_dir: model_dir(
            reader,
            "Directory of the checkpoint. Only the bytes of the node's own experts are read. With `join`\n\
             or `etcd` weight files may be missing: their experts are fetched from other nodes into memory.",
        )?,
        numerics: numerics(reader)?,
        shard: shard(reader, joins)?,
        memory_limit: memory_limit(reader)?,
        join,
        etcd,
        advertise,
        threads: threads(reader)?,
        first_cpu: first_cpu(reader)?,
        device: reader.or(
            "device",
            Device::Cpu,
            "What computes the experts: cpu, or cuda:N for an NVIDIA GPU of the Hopper generation. \
             All\nnodes of a mesh have the same kind, which routers are told as `expert_device`.",
        )?,
        gpu: GpuBudget {
            device: bytes(
                reader,
                "device_memory",
                "Bytes of the GPU's memory for experts. Unset: what is free, but for 3 GiB.",
            )?,
            host: reader.within(
                "host_memory",
                1 << 30,
                0..=1 << 50,
                "Bytes of pinned host memory for experts that are not on the GPU; at least one's.",
            )? as u64,
        },
        isa: isa(reader)?,
        local_socket: reader.or(
            "local_socket",
            mesh::near::Shortcut::Auto,
            "Where `listen` is host:port, whether routers on the same host are also served over a\n\
             Unix socket, which they find by themselves: auto or off.",
        )?,
        shared_rows: shared_rows(reader)?,
        max_queued_rows: reader.within(
            "max_queued_rows",
            65_536,
            1..=1 << 32,
            "Rows that may wait to be computed; more are refused as BUSY.",
        )?,
    };
    let telemetry = telemetry(reader, Role::ExpertNode, config.id.clone())?;
    Ok(Process { telemetry, role: RoleConfig::ExpertNode(config) })
}

fn memory_limit(reader: &mut Reader<'_>) -> Result<Option<u64>, ConfigError> {
    bytes(reader, "memory_limit", "Most bytes of experts that the node may own. Unset: no bound.")
}

/// A number of bytes that may be unset.
fn bytes(
    reader: &mut Reader<'_>,
    key: &'static str,
    about: &'static str,
) -> Result<Option<u64>, ConfigError> {
    let given: Option<usize> = reader.optional(key, "68719476736", about)?;
    Ok(given.map(|bytes| bytes as u64))
}

fn shard(reader: &mut Reader<'_>, joins: bool) -> Result<::expert_node::Shard, ConfigError> {
    const MOST: usize = u16::MAX as usize;
    let count = reader.within(
        "shard_count",
        usize::from(!joins),
        0..=MOST,
        "Nodes that each layer's experts are shared out over when they start; 0 starts with none,\n\
         which is the default of a node that joins. The mesh's controller moves them later.",
    )?;
    let index = reader.within("shard_index", 0, 0..=MOST, "Which share is this node's, from 0.")?;
    let replicas = reader.within(
        "shard_replicas",
        1,
        1..=MOST,
        "Owners of each expert: the node also owns the shares before its own.",
    )?;
    if index >= count.max(1) {
        let problem = format!("{index} is not below shard_count = {count}");
        return Err(reader.refuse("shard_index", problem));
    }
    if replicas > count.max(1) {
        let problem = format!("{replicas} is more than shard_count = {count}");
        return Err(reader.refuse("shard_replicas", problem));
    }
    // Within u16 by the ranges above.
    let small = |number: usize| number as u16;
    Ok(::expert_node::Shard { index: small(index), count: small(count), replicas: small(replicas) })
}
