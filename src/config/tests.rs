//! Bad configurations and what is said about them.

use std::path::Path;
use std::time::Duration;

use crate::config::given::{File, Given, Origin};
use crate::config::reader;
use crate::config::roles::{Role, RoleConfig, declared, resolve};
use crate::config::{ConfigError, local};

fn from_text(role: Role, text: &str) -> Result<RoleConfig, ConfigError> {
    let File { top, .. } = File::parse(text, Path::new("x.toml"))?;
    Ok(resolve(role, &top)?.0.role)
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn a_bad_file_is_refused_naming_line_and_key() {
    const ROUTER: &str = "listen = \"unix:/r\"\nmodel_dir = \"/m\"\n";
    const NODE: &str = "listen = \"unix:/n\"\nmodel_dir = \"/m\"\n";
    let cases = [
        (Role::Router, "listen = ", "x.toml:1: "),
        (Role::Router, "listen = 1\nlisten = 2", "x.toml:2: duplicate key"),
        (Role::Router, "model_dir = \"/m\"", "key `listen` is missing"),
        (
            Role::Router,
            "listen = 7",
            "x.toml:1: key `listen`: expected a string, found the number 7",
        ),
        (Role::Router, "listen = \"here\"", "x.toml:1: key `listen`: `here` is not an endpoint"),
        (Role::Router, "threds = 2", "x.toml:3: unknown key `threds`, expected one of id, listen"),
        (
            Role::Router,
            "threads = \"2\"",
            "x.toml:3: key `threads`: expected a whole number, found the string \"2\"",
        ),
        (Role::Router, "threads = 0", "x.toml:3: key `threads`: 0 is not within 1 to 1024"),
        (Role::Router, "threads = -1", "expected a whole number, found the number -1"),
        (Role::Router, "\nkv_tokens = 1.5", "x.toml:4: key `kv_tokens`: expected a whole number"),
        (
            Role::Router,
            "kv_tokens = 99999999999999",
            "x.toml:3: key `kv_tokens`: 99999999999999 is not within",
        ),
        (
            Role::Router,
            "nodes = \"a:1\"",
            "key `nodes`: expected a list of endpoints, found the string",
        ),
        (
            Role::Router,
            "nodes = [\"a:1\", 2]",
            "key `nodes`: expected a string, found the number 2",
        ),
        (Role::Router, "numerics = \"fp8\"", "key `numerics`: unknown numerics class `fp8`"),
        (Role::Router, "isa = \"mmx\"", "key `isa`: this CPU has no `mmx`; it has scalar"),
        (Role::Router, "expert_wait = \"30\"", "key `expert_wait`: expected a duration such as"),
        (
            Role::Router,
            "expert_wait = 30",
            "key `expert_wait`: expected a string, found the number 30",
        ),
        (Role::Router, "log = \"xml\"", "key `log`: log format `xml`"),
        (Role::Router, "trace_sample = nan", "key `trace_sample`: nan is not within 0.0 to 1.0"),
        (
            Role::Router,
            "etcd = [\"etcd-0\"]",
            "x.toml:3: key `etcd`: `etcd-0` is no etcd server: expected https://host:port",
        ),
        (Role::Router, "etcd = []", "x.toml:3: key `etcd`: at least one server"),
        (
            Role::Router,
            "etcd = [\"https://etcd-0:2379\"]",
            "x.toml:3: key `etcd`: https://etcd-0:2379 needs tls_cert, tls_key and tls_ca",
        ),
        (
            Role::ExpertNode,
            "etcd = [\"127.0.0.1:1\", \"http://etcd-0:2379\"]",
            "x.toml:3: key `etcd`: http://etcd-0:2379 is another machine, and without TLS",
        ),
        (
            Role::Router,
            "etcd_mesh = \"a/b\"\netcd = [\"127.0.0.1:1\"]",
            "x.toml:3: key `etcd_mesh`: `a/b` must not contain `/`",
        ),
        (
            Role::ExpertNode,
            "join = [\"r:1\"]\nlisten = \"0.0.0.0:1\"\nmodel_dir = \"/m\"\ninsecure = true",
            "key `advertise`: has to be set, as others cannot reach a process at 0.0.0.0:1",
        ),
        (
            Role::ExpertNode,
            "shard_index = 3\nshard_count = 3",
            "x.toml:3: key `shard_index`: 3 is not below shard_count = 3",
        ),
        (
            Role::ExpertNode,
            "shard_replicas = 2",
            "x.toml:3: key `shard_replicas`: 2 is more than shard_count = 1",
        ),
        (
            Role::Gateway,
            "listen = \"unix:/g\"\nmodel_dir = \"/m\"\nrouters = []",
            "key `listen`: a gateway listens on host:port",
        ),
        (
            Role::Gateway,
            "listen = \"h:1\"\nmodel_dir = \"/m\"\nrouters = []",
            "x.toml:3: key `routers`: at least one router",
        ),
        (
            Role::Gateway,
            "listen = \"h:1\"\nmodel_dir = \"\"\nrouters = [\"h:2\"]",
            "x.toml:2: key `model_dir`: must not be empty",
        ),
    ];
    for (role, text, want) in cases {
        let whole = match role {
            Role::Router if !text.starts_with("listen") && !text.starts_with("model_dir") => {
                format!("{ROUTER}{text}")
            }
            Role::ExpertNode if !text.contains("listen") => format!("{NODE}{text}"),
            _ => text.to_owned(),
        };
        let error = from_text(role, &whole).expect_err(text).to_string();
        assert!(error.contains(want), "{text}: {error}");
        assert!(!error.contains('\n'), "one line: {error}");
    }
}

#[test]
fn later_sources_win_and_are_named_when_wrong() {
    let file = "listen = \"unix:/r\"\nmodel_dir = \"/m\"\nmax_running = 1\nmax_waiting = 1";
    let mut given = File::parse(file, Path::new("x.toml")).unwrap().top;
    let variables = [
        ("MOEMESH_ROUTER_MAX_RUNNING", "2"),
        ("MOEMESH_ROUTER_MAX_WAITING", "2"),
        ("MOEMESH_ROUTER_PORT_7000_TCP_ADDR", "set by Kubernetes"),
        ("MOEMESH_GATEWAY_NONSENSE", "another role's"),
    ];
    given.add_environment(Role::Router.prefix(), pairs(&variables));
    given.add_pairs(&["max_running=3".into(), "nodes = a:1, unix:/b".into()]).unwrap();
    let RoleConfig::Router(router) = resolve(Role::Router, &given).unwrap().0.role else {
        panic!("not a router")
    };
    assert_eq!((router.max_running, router.max_waiting), (3, 2));
    assert_eq!(router.nodes, ["a:1".parse().unwrap(), "unix:/b".parse().unwrap()]);
    assert_eq!(router.request_timeout, Duration::from_secs(600));

    for (variable, value, want) in [
        (
            "MOEMESH_ROUTER_THREADS",
            "many",
            "environment variable MOEMESH_ROUTER_THREADS: key `threads`: expected a whole number, found `many`",
        ),
        (
            "MOEMESH_ROUTER_THREDS",
            "2",
            "environment variable MOEMESH_ROUTER_THREDS: unknown key `threds`",
        ),
    ] {
        let mut bad = given.clone();
        bad.add_environment(Role::Router.prefix(), pairs(&[(variable, value)]));
        let error = resolve(Role::Router, &bad).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    }
    let mut bad = given.clone();
    bad.add_pairs(&["kv_tokens=lots".into()]).unwrap();
    let error = resolve(Role::Router, &bad).unwrap_err().to_string();
    assert!(error.starts_with("--set: key `kv_tokens`"), "{error}");
    assert!(given.add_pairs(&["kv_tokens".into()]).is_err());
}

#[test]
fn a_printed_configuration_reads_back_as_itself() {
    for role in Role::ALL {
        let printed = reader::print("title", &declared(role).unwrap());
        let file = File::parse(&printed, Path::new("printed.toml")).unwrap();
        let (_, again) = resolve(role, &file.top).unwrap();
        assert_eq!(reader::print("title", &again), printed);
    }
}

#[test]
fn keys_of_optional_examples_are_valid() {
    for role in Role::ALL {
        let printed = reader::print("title", &declared(role).unwrap());
        let all_set = printed.replace("# isa = \"scalar\"", "isa = \"scalar\"");
        // Only some builds can talk to etcd.
        let here = |line: &&str| cfg!(feature = "etcd") || !line.starts_with("# etcd = ");
        let all_set: String = all_set
            .lines()
            .filter(here)
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.contains(" = ") => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let file = File::parse(&all_set, Path::new("printed.toml")).unwrap();
        resolve(role, &file.top).unwrap();
    }
}

#[test]
fn a_local_mesh_is_refused_like_a_role() {
    for (flag, key, text, want) in [
        (
            "--expert-nodes",
            "expert_nodes",
            "three",
            "--expert-nodes: key `expert_nodes`: expected a whole number, found `three`",
        ),
        ("--expert-nodes", "expert_nodes", "1000", "is not within 0 to 256"),
        ("--gateways", "gateways", "0", "--gateways: key `gateways`: 0 is not within 1 to 256"),
        (
            "--replicas",
            "replicas",
            "4",
            "--replicas: key `replicas`: 4 is more than there are expert nodes (3)",
        ),
        ("--http", "http", "unix:/x", "--http: key `http`: a gateway listens on host:port"),
        ("--http", "http", "8080", "--http: key `http`: `8080` is not an endpoint"),
        ("--threads", "threads", "0", "--threads: key `threads`: 0 is not within 1 to 1024"),
    ] {
        let error = local::load(None, &[], vec![(key, flag, text.to_owned())]).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
    let variables = pairs(&[("MOEMESH_UP_ROUTERS", "2"), ("MOEMESH_GATEWAY_MAX_N", "4")]);
    let local = local::load(None, &variables, Vec::new()).unwrap();
    assert_eq!((local.routers, local.expert_nodes, local.replicas), (2, 3, 1));
    assert_eq!(local.http, ("127.0.0.1".to_owned(), 8080));
    let (_, origin) = local.extra[&Role::Gateway].get("max_n").unwrap();
    assert_eq!(*origin, Origin::Environment("MOEMESH_GATEWAY_MAX_N".to_owned()));
    assert_eq!(local.extra[&Role::Router].iter().count(), 0);
}

#[test]
fn nothing_given_is_nothing_to_refuse() {
    assert_eq!(Given::default().iter().count(), 0);
    let missing = resolve(Role::Router, &Given::default()).unwrap_err().to_string();
    assert_eq!(
        missing,
        "key `listen` is missing: set it in the file, as MOEMESH_ROUTER_LISTEN, or with --set listen=…"
    );
}

/// With etcd nobody else need be named, and any router may be the controller.
#[test]
fn etcd_is_taken_by_builds_that_have_it_and_refused_by_others() {
    const OWN: [&str; 3] = [
        "listen = \"h:1\"\nmodel_dir = \"/m\"\n",
        "listen = \"unix:/r\"\nmodel_dir = \"/m\"\n",
        "listen = \"unix:/n\"\nmodel_dir = \"/m\"\n",
    ];
    for (role, own) in Role::ALL.into_iter().zip(OWN) {
        let taken = from_text(role, &format!("{own}etcd = [\"http://127.0.0.1:2379\"]"));
        assert_eq!(taken.is_ok(), cfg!(feature = "etcd"), "{role}");
        match taken {
            Ok(RoleConfig::Gateway(config)) => assert!(config.etcd.is_some()),
            Ok(RoleConfig::Router(config)) => assert!(config.etcd.is_some() && config.controller),
            Ok(RoleConfig::ExpertNode(config)) => {
                assert!(config.etcd.is_some() && config.shard.count == 0);
            }
            Err(error) => {
                let want = "x.toml:3: key `etcd`: this binary was built without etcd: build it \
                            with `cargo build --release --features etcd`";
                assert!(error.to_string().starts_with(want), "{error}");
            }
        }
    }
}
