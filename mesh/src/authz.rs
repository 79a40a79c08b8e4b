//! Which role may call which method: the one table of it. What is not in the
//! table is nobody's. Applies to connections with certificates; without TLS
//! there is nobody to tell apart.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::tls::Role::{self, ExpertNode, Gateway, Operator, Router};
use crate::tls::{Caller, Principal, TlsMetrics};

/// Every gRPC method of the mesh and its callers.
pub const METHODS: [(&str, &[Role]); 21] = [
    ("/moemesh.v1.ExpertData/Dispatch", &[Router]),
    ("/moemesh.v1.ExpertControl/Describe", &[Router, Operator]),
    ("/moemesh.v1.ExpertControl/Status", &[Router, Operator]),
    ("/moemesh.v1.ExpertControl/Drain", &[Router, Operator]),
    ("/moemesh.v1.ExpertControl/Watch", &[Router, Operator]),
    ("/moemesh.v1.ExpertControl/Load", &[Router]),
    ("/moemesh.v1.ExpertControl/Drop", &[Router]),
    ("/moemesh.v1.ExpertControl/SetDrained", &[Router]),
    ("/moemesh.v1.ExpertControl/Fetch", &[ExpertNode]),
    ("/moemesh.v1.Inference/Generate", &[Gateway, Operator]),
    ("/moemesh.v1.Inference/Status", &[Gateway, Operator]),
    ("/moemesh.v1.Operations/Join", &[ExpertNode, Operator]),
    ("/moemesh.v1.Operations/Leave", &[Operator]),
    ("/moemesh.v1.Operations/Placement", &[Operator]),
    ("/moemesh.v1.Operations/Drain", &[Operator]),
    ("/moemesh.v1.Operations/Rebalance", &[Operator]),
    ("/moemesh.v1.Operations/Heads", &[ExpertNode]),
    ("/grpc.health.v1.Health/Check", &[Gateway, Router, ExpertNode, Operator]),
    ("/grpc.health.v1.Health/List", &[Gateway, Router, ExpertNode, Operator]),
    ("/grpc.health.v1.Health/Watch", &[Gateway, Router, ExpertNode, Operator]),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &[Operator]),
];

/// Whether `caller` may call `method`.
///
/// # Errors
/// Names caller, method and who may call it.
pub fn check(caller: &Principal, method: &str) -> Result<(), String> {
    let known = METHODS.iter().find(|(name, _)| *name == method);
    match known {
        Some((_, roles)) if roles.contains(&caller.role) => Ok(()),
        Some((_, roles)) => {
            let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
            let (caller, roles) = (caller.short(), roles.join(" and "));
            Err(format!("{caller} may not call {method}, which is for {roles}"))
        }
        None => {
            let method: String = method.chars().take(100).collect();
            Err(format!("{} may not call {method}, which is not in the table", caller.short()))
        }
    }
}

/// Puts the table before a server's services.
#[derive(Clone, Debug)]
pub(crate) struct Authorize(pub TlsMetrics);

impl<S> Layer<S> for Authorize {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, metrics: self.0.clone() }
    }
}

/// Services that only those reach who may.
#[derive(Clone, Debug)]
pub(crate) struct Guarded<S> {
    inner: S,
    metrics: TlsMetrics,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let checked = match request.extensions().get::<Caller>() {
            Some(Caller(caller)) => check(caller, request.uri().path()),
            None => Err("the caller is unknown".to_owned()),
        };
        match checked {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(why) => {
                self.metrics.denied();
                tracing::warn!(why, "call denied");
                Box::pin(async move { Ok(Status::permission_denied(why).into_http()) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    fn principal(role: Role) -> Principal {
        Principal::new("m", role, "x").unwrap()
    }

    /// A method that is added to the protocol and not to the table is denied to
    /// everybody: this says so before anyone wonders.
    #[test]
    fn every_method_of_the_protocol_is_in_the_table_and_no_other() {
        let described = FileDescriptorSet::decode(proto::DESCRIPTOR).unwrap();
        let mut methods = BTreeSet::new();
        for file in &described.file {
            for service in &file.service {
                for method in &service.method {
                    methods.insert(format!(
                        "/{}.{}/{}",
                        file.package(),
                        service.name(),
                        method.name()
                    ));
                }
            }
        }
        assert!(methods.len() >= 6, "{methods:?}");
        let ours = METHODS.iter().map(|(name, _)| (*name).to_owned());
        let ours: BTreeSet<String> = ours.filter(|name| name.starts_with("/moemesh.")).collect();
        assert_eq!(ours, methods);
    }

    #[test]
    fn each_role_may_call_what_is_its_own_and_nothing_else() {
        let may = |role| -> Vec<&str> {
            let caller = principal(role);
            let methods = METHODS.iter().map(|(name, _)| *name);
            let ours = methods.filter(|name| name.starts_with("/moemesh."));
            ours.filter(|name| check(&caller, name).is_ok())
                .map(|name| name.strip_prefix("/moemesh.v1.").unwrap())
                .collect()
        };
        let node = ["ExpertControl/Fetch", "Operations/Join", "Operations/Heads"];
        assert_eq!(may(Role::ExpertNode), node);
        assert_eq!(may(Role::Gateway), ["Inference/Generate", "Inference/Status"]);
        assert_eq!(
            may(Role::Router),
            [
                "ExpertData/Dispatch",
                "ExpertControl/Describe",
                "ExpertControl/Status",
                "ExpertControl/Drain",
                "ExpertControl/Watch",
                "ExpertControl/Load",
                "ExpertControl/Drop",
                "ExpertControl/SetDrained"
            ]
        );
        assert_eq!(
            may(Role::Operator),
            [
                "ExpertControl/Describe",
                "ExpertControl/Status",
                "ExpertControl/Drain",
                "ExpertControl/Watch",
                "Inference/Generate",
                "Inference/Status",
                "Operations/Join",
                "Operations/Leave",
                "Operations/Placement",
                "Operations/Drain",
                "Operations/Rebalance"
            ]
        );
    }

    #[test]
    fn who_is_denied_hears_who_he_is_and_what_he_called() {
        let caller = principal(Role::Gateway);
        let denied = check(&caller, "/moemesh.v1.ExpertControl/Drain").unwrap_err();
        let want = "gateway/x may not call /moemesh.v1.ExpertControl/Drain, which is for router and operator";
        assert_eq!(denied, want);
        for unknown in ["", "/", "/moemesh.v1.ExpertControl/", "/moemesh.v1.ExpertControl/drain"] {
            for role in Role::ALL {
                assert!(check(&principal(role), unknown).unwrap_err().contains("not in the table"));
            }
        }
    }
}
