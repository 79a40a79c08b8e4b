//! From what was asked for to what is started: every process of a local mesh,
//! its configuration file, its command line, and where it is reached. Pure, so
//! that it can be tested; nothing is started here.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use mesh::telemetry::LogFormat;
use mesh::transport::Endpoint;
use toml::Value;

use crate::certs::authority::files_in;
use crate::config::ConfigError;
use crate::config::given::Given;
use crate::config::local::Local;
use crate::config::reader;
use crate::config::roles::{self, Role};

/// One process to be started.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name in the mesh, such as `router-0`.
    pub id: String,
    pub role: Role,
    /// Where it is called: HTTP for a gateway, gRPC for the others.
    pub endpoint: Endpoint,
    /// Where it answers `/readyz`.
    pub admin: Endpoint,
    pub config_file: PathBuf,
    pub config: String,
}

/// Where the certificates of a mesh with TLS are, in its directory.
pub fn certificates(dir: &Path) -> PathBuf {
    dir.join("certs")
}

impl Planned {
    /// The arguments of its command line.
    pub fn arguments(&self) -> [OsString; 4] {
        [
            self.role.name().into(),
            "--config".into(),
            self.config_file.clone().into(),
            "--die-with-parent".into(),
        ]
    }
}

/// Every process of the mesh, in the order they are started: nodes, routers,
/// gateways. `http` has one address per gateway; sockets and files go to `dir`.
///
/// # Errors
/// A setting of a role's section or variables that the role refuses, or that
/// only the plan can choose.
pub fn plan(
    local: &Local,
    model: &Path,
    dir: &Path,
    http: &[Endpoint],
    log_filter: &str,
) -> Result<Vec<Planned>, ConfigError> {
    let planner = Planner { local, model, dir, log_filter };
    let count = local.expert_nodes;
    let nodes = (0..count).map(|index| planner.node(index)).collect::<Result<Vec<_>, _>>()?;
    let routers = (0..local.routers)
        .map(|index| planner.router(index, &nodes))
        .collect::<Result<Vec<_>, _>>()?;
    let gateways = http
        .iter()
        .enumerate()
        .map(|(index, address)| planner.gateway(index, address, &routers))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(nodes.into_iter().chain(routers).chain(gateways).collect())
}

struct Planner<'a> {
    local: &'a Local,
    model: &'a Path,
    dir: &'a Path,
    log_filter: &'a str,
}

impl Planner<'_> {
    fn node(&self, index: usize) -> Result<Planned, ConfigError> {
        let mut fixed = Given::default();
        fixed.derive("shard_index", index as i64);
        fixed.derive("shard_count", self.local.expert_nodes as i64);
        fixed.derive("shard_replicas", self.local.replicas as i64);
        // Twice its share: a step's rows rarely keep all nodes equally busy.
        let share = self.local.threads.div_ceil(self.local.expert_nodes);
        let threads = (2 * share).min(self.local.threads);
        // The first router's engine is on CPU 0, so that the last to share that one is a node.
        self.grpc(Role::ExpertNode, index, (threads, index * share + 1), fixed)
    }

    fn router(&self, index: usize, nodes: &[Planned]) -> Result<Planned, ConfigError> {
        let mut fixed = Given::default();
        fixed.derive("nodes", endpoints(nodes));
        // One decides who owns what; the others follow what nodes own.
        fixed.derive("controller", index == 0);
        fixed.derive("replicas", self.local.replicas as i64);
        let threads = (self.local.threads / self.local.routers).max(1);
        self.grpc(Role::Router, index, (threads, index * threads), fixed)
    }

    /// A router or an expert node: gRPC and its side door on Unix sockets. Its threads, if they are
    /// bound, begin at a CPU of its own, so that what a process does alone is not all done on one.
    fn grpc(
        &self,
        role: Role,
        index: usize,
        (threads, first_cpu): (usize, usize),
        mut fixed: Given,
    ) -> Result<Planned, ConfigError> {
        let id = format!("{role}-{index}");
        let endpoint = Endpoint::Unix(self.dir.join(format!("{id}.sock")));
        let admin = Endpoint::Unix(self.dir.join(format!("{id}.admin.sock")));
        fixed.derive("listen", endpoint.to_string());
        fixed.derive("admin", admin.to_string());
        fixed.derive("numerics", self.local.numerics.to_string());
        let mut soft = Given::default();
        soft.derive("threads", threads as i64);
        if self.local.bind {
            soft.derive("first_cpu", first_cpu as i64);
        }
        self.planned(role, id, (endpoint, admin), fixed, soft)
    }

    fn gateway(
        &self,
        index: usize,
        address: &Endpoint,
        routers: &[Planned],
    ) -> Result<Planned, ConfigError> {
        let mut fixed = Given::default();
        fixed.derive("listen", address.to_string());
        fixed.derive("routers", endpoints(routers));
        let id = format!("gateway-{index}");
        let at = (address.clone(), address.clone());
        self.planned(Role::Gateway, id, at, fixed, Given::default())
    }

    /// Joins `soft` settings, what was given for the role, and `fixed` ones,
    /// which nobody else may give.
    fn planned(
        &self,
        role: Role,
        id: String,
        (endpoint, admin): (Endpoint, Endpoint),
        mut fixed: Given,
        mut soft: Given,
    ) -> Result<Planned, ConfigError> {
        fixed.derive("id", id.as_str());
        if self.local.tls {
            let files = files_in(&certificates(self.dir), &id);
            fixed.derive("tls_cert", files.certificate.display().to_string());
            fixed.derive("tls_key", files.key.display().to_string());
            fixed.derive("tls_ca", files.authorities.display().to_string());
        }
        fixed.derive("model_dir", self.model.display().to_string());
        let format = match self.local.log {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        soft.derive("log", format);
        soft.derive("log_filter", self.log_filter);
        if let Some(otlp) = &self.local.otlp {
            soft.derive("otlp", otlp.as_str());
        }
        let mut given = soft;
        if let Some(extra) = self.local.extra.get(&role) {
            for (key, _, origin) in extra.iter() {
                if fixed.get(key).is_some() {
                    let (origin, key) = (origin.clone(), key.to_owned());
                    return Err(ConfigError::Reserved { origin, key });
                }
            }
            given.extend(extra.clone());
        }
        given.extend(fixed);
        let (_, declared) = roles::resolve(role, &given)?;
        let title = format!("{id}, written by `moemesh up` and removed when it ends.");
        let config = reader::print(&title, &declared);
        let config_file = self.dir.join(format!("{id}.toml"));
        Ok(Planned { id, role, endpoint, admin, config_file, config })
    }
}

fn endpoints(processes: &[Planned]) -> Vec<Value> {
    processes.iter().map(|process| Value::String(process.endpoint.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::given::{File, Origin, Raw};
    use crate::config::local;
    use crate::config::roles::RoleConfig;

    fn planned(local: &Local) -> Result<Vec<Planned>, ConfigError> {
        let http: Vec<Endpoint> =
            (0..local.gateways).map(|n| Endpoint::Tcp(format!("h:{}", 80 + n))).collect();
        plan(local, Path::new("/models/tiny"), Path::new("/run/m"), &http, "info")
    }

    fn local(flags: &[(&'static str, &str)]) -> Local {
        let flags = flags.iter().map(|(key, text)| (*key, "--flag", (*text).to_owned())).collect();
        local::load(None, &[], flags).unwrap()
    }

    fn config(process: &Planned) -> RoleConfig {
        let file = File::parse(&process.config, &process.config_file).unwrap();
        roles::resolve(process.role, &file.top).unwrap().0.role
    }

    #[test]
    fn every_process_knows_those_behind_it() {
        let local = local(&[
            ("gateways", "2"),
            ("expert_nodes", "2"),
            ("replicas", "2"),
            ("threads", "5"),
            ("numerics", "f32"),
        ]);
        let plan = planned(&local).unwrap();
        let ids: Vec<&str> = plan.iter().map(|process| process.id.as_str()).collect();
        assert_eq!(ids, ["expert-node-0", "expert-node-1", "router-0", "gateway-0", "gateway-1"]);
        let RoleConfig::ExpertNode(node) = config(&plan[1]) else { panic!("no node") };
        assert_eq!(node.listen.to_string(), "unix:/run/m/expert-node-1.sock");
        assert_eq!((node.shard.index, node.shard.count, node.shard.replicas), (1, 2, 2));
        assert_eq!(node.threads, 5, "twice its share, and no more than there are");
        let RoleConfig::Router(router) = config(&plan[2]) else { panic!("no router") };
        assert_eq!(router.nodes, [plan[0].endpoint.clone(), plan[1].endpoint.clone()]);
        assert_eq!((router.threads, router.numerics), (5, model::Numerics::F32));
        assert_eq!((router.controller, router.replicas), (true, 2));
        let RoleConfig::Gateway(gateway) = config(&plan[4]) else { panic!("no gateway") };
        assert_eq!(gateway.listen, "h:81");
        assert_eq!(gateway.routers, [plan[2].endpoint.clone()]);
        assert_eq!(gateway.model_name, "tiny");
    }

    #[test]
    fn bound_threads_begin_at_a_cpu_of_their_own() {
        let firsts = |bind| {
            let flags = [("expert_nodes", "2"), ("routers", "2"), ("threads", "4"), ("bind", bind)];
            let first = |process: &Planned| match config(process) {
                RoleConfig::ExpertNode(node) => node.first_cpu,
                RoleConfig::Router(router) => router.first_cpu,
                RoleConfig::Gateway(_) => None,
            };
            planned(&local(&flags)).unwrap().iter().map(first).collect::<Vec<_>>()
        };
        assert_eq!(firsts("true"), [Some(1), Some(3), Some(0), Some(2), None]);
        assert_eq!(firsts("false"), [None; 5]);
    }

    #[test]
    fn without_nodes_the_router_has_the_experts() {
        let plan = planned(&local(&[("expert_nodes", "0")])).unwrap();
        assert_eq!(plan.len(), 2);
        let RoleConfig::Router(router) = config(&plan[0]) else { panic!("no router") };
        assert!(router.nodes.is_empty());
    }

    #[test]
    fn with_tls_every_process_has_its_own_certificate() {
        let plan = planned(&local(&[("tls", "true"), ("expert_nodes", "1")])).unwrap();
        let RoleConfig::ExpertNode(node) = config(&plan[0]) else { panic!("no node") };
        let RoleConfig::Router(router) = config(&plan[1]) else { panic!("no router") };
        let RoleConfig::Gateway(gateway) = config(&plan[2]) else { panic!("no gateway") };
        for (files, id) in
            [(node.tls, "expert-node-0"), (router.tls, "router-0"), (gateway.tls, "gateway-0")]
        {
            assert_eq!(files, Some(files_in(Path::new("/run/m/certs"), id)));
        }
        let RoleConfig::Router(plain) = config(&planned(&local(&[])).unwrap()[3]) else {
            panic!("no router")
        };
        assert_eq!(plain.tls, None);
    }

    #[test]
    fn a_command_line_names_role_and_file() {
        let plan = planned(&local(&[])).unwrap();
        assert_eq!(
            plan[0].arguments(),
            ["expert-node", "--config", "/run/m/expert-node-0.toml", "--die-with-parent"]
        );
    }

    #[test]
    fn a_role_may_be_given_more_but_not_what_the_plan_chooses() {
        let mut local = local(&[]);
        let origin = Origin::Environment("MOEMESH_ROUTER_X".to_owned());
        let mut extra = Given::default();
        extra.put("max_running", Raw::Text("7".to_owned()), origin.clone());
        local.extra.insert(Role::Router, extra.clone());
        let RoleConfig::Router(router) = config(&planned(&local).unwrap()[3]) else {
            panic!("no router")
        };
        assert_eq!(router.max_running, 7);

        extra.put("listen", Raw::Text("h:1".to_owned()), origin);
        local.extra.insert(Role::Router, extra);
        assert_eq!(
            planned(&local).unwrap_err().to_string(),
            "environment variable MOEMESH_ROUTER_X: key `listen` is chosen by `moemesh up`"
        );
    }
}
