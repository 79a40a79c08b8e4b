//! `moemesh certs`: a development authority and the certificates of a mesh's
//! processes. Any other authority serves as well, as long as its certificates
//! name their holders in the same way (docs/security.md). Rooms: [`authority`]
//! makes, [`show`] explains, [`operator`] finds the identity of a command.

pub mod authority;
pub mod operator;
mod show;

use std::path::Path;

use mesh::tls::Role;

use crate::certs::authority::{Authority, Issued};
use crate::cli::{AllArgs, CertsCommand};

/// Runs one of the commands and says what it did.
pub fn run(what: CertsCommand) -> anyhow::Result<()> {
    match what {
        CertsCommand::Init(args) => init(&args.dir, &args.mesh, args.days, args.force),
        CertsCommand::Issue(args) => {
            let authority = Authority::open(&args.dir)?;
            let issued = authority.issue(args.role, &args.id, args.days, args.force)?;
            say(&issued);
            println!("\n{}", issued.settings());
            Ok(())
        }
        CertsCommand::All(args) => all(&args),
        CertsCommand::Show { file } => {
            print!("{}", show::describe(&file)?);
            Ok(())
        }
    }
}

fn init(dir: &Path, mesh: &str, days: u32, force: bool) -> anyhow::Result<()> {
    let authority = Authority::create(dir, mesh, days, force)?;
    println!(
        "made the authority of mesh `{mesh}`, until {}\n  {}  every process's tls_ca\n  {}  \
         keep it where no process of the mesh runs",
        authority.until(),
        authority.certificate().display(),
        authority.key().display()
    );
    Ok(())
}

fn all(args: &AllArgs) -> anyhow::Result<()> {
    const AUTHORITY_DAYS: u32 = 3650;
    if !Authority::is_in(&args.dir) {
        init(&args.dir, &args.mesh, AUTHORITY_DAYS.max(args.days), false)?;
    }
    let authority = Authority::open(&args.dir)?;
    let wanted = [
        (Role::Gateway, args.gateways),
        (Role::Router, args.routers),
        (Role::ExpertNode, args.expert_nodes),
        (Role::Operator, args.operators),
    ];
    let ids = || wanted.iter().flat_map(|&(role, count)| (0..count).map(move |n| (role, n)));
    // All or nothing: half a set helps nobody.
    if !args.force {
        for (role, n) in ids() {
            authority.refuse_existing(&format!("{role}-{n}"))?;
        }
    }
    for (role, n) in ids() {
        say(&authority.issue(role, &format!("{role}-{n}"), args.days, args.force)?);
    }
    Ok(())
}

fn say(issued: &Issued) {
    println!(
        "issued {}, until {}\n  {}\n  {}",
        issued.principal,
        issued.until,
        issued.files.certificate.display(),
        issued.files.key.display()
    );
}
