//! The keys of where the members of a mesh are kept: in etcd, or nowhere but in
//! configurations.

use mesh::registry::{Etcd, Server};
use mesh::tls::Files;
use mesh::transport::Endpoint;

use crate::config::ConfigError;
use crate::config::reader::Reader;

/// The etcd that the process registers with and learns others from, if any.
pub fn etcd(
    reader: &mut Reader<'_>,
    tls: Option<&Files>,
    insecure: bool,
) -> Result<Option<Etcd>, ConfigError> {
    let servers: Option<Vec<Server>> = reader.optional(
        "etcd",
        "[\"http://127.0.0.1:2379\"]",
        "etcd servers that keep who is in the mesh, and which router is its controller. Nodes and\n\
         routers register there and are found there, beside those that are configured. https://\n\
         uses tls_cert, tls_key and tls_ca. Needs a binary built with `--features etcd`.",
    )?;
    let mesh: String = reader.or(
        "etcd_mesh",
        "default".to_owned(),
        "Name of the mesh in etcd: what it keeps begins with /moemesh/NAME/.",
    )?;
    let Some(servers) = servers else { return Ok(None) };
    if servers.is_empty() {
        return Err(reader.refuse("etcd", "at least one server is needed"));
    }
    if mesh.contains('/') {
        return Err(reader.refuse("etcd_mesh", format!("`{mesh}` must not contain `/`")));
    }
    for server in &servers {
        let secure = server.is_secure(tls.is_some());
        if secure && tls.is_none() {
            let problem = format!("{server} needs tls_cert, tls_key and tls_ca");
            return Err(reader.refuse("etcd", problem));
        }
        if !secure && !insecure && !server.is_loopback() {
            let problem = format!(
                "{server} is another machine, and without TLS anyone may pretend to be it: use \
                 https:// with tls_cert, tls_key and tls_ca, or insecure = true where the network \
                 is trusted"
            );
            return Err(reader.refuse("etcd", problem));
        }
    }
    let etcd = Etcd::new(servers, &mesh, tls.cloned());
    etcd.map(Some).map_err(|without| reader.refuse("etcd", without.to_string()))
}

/// Where others reach a process that they learn of, if not at `listen`.
pub fn advertise(
    reader: &mut Reader<'_>,
    listen: &Endpoint,
    is_learned_of: bool,
) -> Result<Option<Endpoint>, ConfigError> {
    let advertise = reader.optional(
        "advertise",
        "\"host-7:7100\"",
        "Where others reach this process when they learn of it. Unset: at `listen`.",
    )?;
    let listen = listen.to_string();
    let everywhere = listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:");
    if everywhere && is_learned_of && advertise.is_none() {
        let problem = format!("has to be set, as others cannot reach a process at {listen}");
        return Err(reader.refuse("advertise", problem));
    }
    Ok(advertise)
}
