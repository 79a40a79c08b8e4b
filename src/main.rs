//! The one binary of moemesh. It has no logic of its own: it parses the command
//! line ([`cli`]) and the configuration ([`config`]) once, runs what was asked
//! for, and turns the outcome into one line and an exit code ([`exit`]).

#![forbid(unsafe_code)]

mod bench;
mod certs;
mod cli;
mod client;
mod completions;
mod config;
mod exit;
mod generate;
mod model_dir;
mod operate;
mod plan;
mod published;
mod role;
mod status;
mod up;
mod weights;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{BenchCommand, Cli, Command, ComputingArgs, RoleArgs, UpArgs};
use crate::client::http::Server;
use crate::config::local::Local;
use crate::config::roles::Role;
use crate::up::lines::ERROR_MARK;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(help) => {
            // Whoever closed the terminal does not read it.
            let _ = help.print();
            return if help.use_stderr() { exit::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match tokio::runtime::Runtime::new() {
        Ok(runtime) => {
            let ended =
                runtime.block_on(run(cli.command.unwrap_or(Command::Up(UpArgs::default()))));
            // Blocking reads of standard input would be waited for otherwise.
            runtime.shutdown_background();
            report(ended)
        }
        Err(error) => report(Err(error.into())),
    }
}

fn report(ended: anyhow::Result<()>) -> ExitCode {
    let Err(error) = ended else { return ExitCode::SUCCESS };
    let code = exit::code(&error);
    // Ctrl-C needs no explanation, only an end to the line that it broke off.
    let line = match code {
        exit::INTERRUPTED => String::new(),
        _ => format!("{ERROR_MARK}{}", one_line(&error)),
    };
    let _ = writeln!(std::io::stderr(), "{line}");
    code.into()
}

/// An error and its causes, less those that the message before them tells already.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text.replace('\n', " ")
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up(args) => up::run(Local::for_up(&args)?).await,
        Command::Generate(args) => {
            let request = generate::Request {
                prompt: args.prompt,
                chat: args.chat,
                max_tokens: args.max_tokens,
                temperature: args.temperature,
                seed: args.seed,
            };
            match args.url {
                Some(url) => {
                    let server = Server::from_url(&url, args.api_key)?;
                    generate::from_server(&request, &server, args.mesh.model).await
                }
                None => {
                    generate::from_own_mesh(&request, &Local::for_one_command(&args.mesh)?).await
                }
            }
        }
        Command::Gateway(args) => role(Role::Gateway, args).await,
        Command::Router(args) => role(Role::Router, on_device(args)).await,
        Command::ExpertNode(args) => role(Role::ExpertNode, on_device(args)).await,
        Command::Status(args) => status::run(args).await,
        Command::Drain(args) => operate::drain(args).await,
        Command::Rebalance(args) => operate::rebalance(args).await,
        Command::Join(args) => operate::join(args).await,
        Command::Leave(args) => operate::leave(args).await,
        Command::Plan(args) => plan::run(&args),
        Command::Certs(args) => certs::run(args.what),
        Command::Bench(args) => match args.what {
            BenchCommand::Serve(args) => bench::serve::run(args).await,
            BenchCommand::Compare(args) => bench::compare::run(args).await,
            BenchCommand::Dispatch(args) => bench::dispatch::run(args).await,
            BenchCommand::Kernels(args) => bench::kernels::run(&args),
            BenchCommand::Device(args) => bench::device::run(&args),
            BenchCommand::MakeCheckpoint(args) => bench::checkpoint::make(&args),
        },
        Command::Completions { shell } => {
            completions::print(shell);
            Ok(())
        }
    }
}

/// A device that was given is a setting like others.
fn on_device(args: ComputingArgs) -> RoleArgs {
    let ComputingArgs { role: mut args, device } = args;
    args.set.extend(device.map(|device| format!("device={device}")));
    args
}

async fn role(role: Role, args: RoleArgs) -> anyhow::Result<()> {
    let file = args.config.as_deref();
    if args.print_config {
        return role::print_config(role, file, &args.set);
    }
    role::run(role, file, &args.set, args.die_with_parent).await
}
