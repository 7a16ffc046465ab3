//! `rota completions` and `rota man`: what a shell and `man` need to know of the command line, made from its definition.

use std::{error::Error, fs, io, path::PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use crate::{FAILURE, say};

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rota completions bash > /etc/bash_completion.d/rota\n  \
    rota completions zsh > /usr/local/share/zsh/site-functions/_rota\n  \
    rota completions fish > ~/.config/fish/completions/rota.fish")]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// Prints the script; returns the process's exit status.
    pub(crate) fn run(&self, mut command: Command) -> u8 {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "rota", &mut script);
        // Nobody is left to tell that standard output is closed.
        let _ = io::Write::write_all(&mut io::stdout(), &script);
        0
    }
}

#[derive(Args)]
#[command(after_help = "Example:\n  rota man /usr/local/share/man/man1 && man rota-run")]
pub(crate) struct Man {
    /// The folder to write rota.1, rota-run.1 and so on to; it is made if it is not there
    folder: PathBuf,
}

impl Man {
    /// Writes the pages; returns the process's exit status.
    pub(crate) fn run(&self, command: Command) -> u8 {
        match self.write(command) {
            Ok(()) => 0,
            Err(error) => {
                say(format_args!(
                    "cannot write man pages to {}: {error}",
                    self.folder.display()
                ));
                FAILURE
            }
        }
    }

    fn write(&self, command: Command) -> Result<(), Box<dyn Error>> {
        fs::create_dir_all(&self.folder)?;
        // The generator would make a page for each word that `rota help` takes, too.
        clap_mangen::generate_to(command.disable_help_subcommand(true), &self.folder)?;
        Ok(())
    }
}
