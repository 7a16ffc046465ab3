//! What each vCPU gets, in a file that is written anew every second while the machine runs: for Prometheus (the text file collector
//! of its node exporter), or as JSON where the file's name ends in `.json`.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use scheduler::VmMeter;
use tracing::warn;

/// How often it is written.
const EVERY: Duration = Duration::from_secs(1);

/// The file of one machine, removed when this is dropped: a machine that has ended has no metrics.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    due: Instant,
    failed: bool,
}

impl MetricsFile {
    /// Makes the file, without content yet.
    ///
    /// # Errors
    /// It cannot be written there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = Self {
            path: path.to_owned(),
            due: Instant::now(),
            failed: false,
        };
        file.replace("")?;
        Ok(file)
    }

    /// When it is to be written next.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Writes what `sample` says, if it is time. That it cannot be written any more is told once, and no reason to end a machine.
    pub fn tick(&mut self, sample: impl FnOnce() -> VmMeter) {
        let now = Instant::now();
        if now < self.due {
            return;
        }
        self.due = now + EVERY;
        match self.text(&sample()).and_then(|text| self.replace(&text)) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                warn!("metrics: cannot write {}: {error}", self.path.display());
            }
            Err(_) => {}
        }
    }

    fn text(&self, sample: &VmMeter) -> io::Result<String> {
        if self.path.extension() == Some(OsStr::new("json")) {
            return Ok(sample.to_json()? + "\n");
        }
        Ok(sample.to_prometheus())
    }

    /// In one step, so that nobody reads half of it.
    fn replace(&self, text: &str) -> io::Result<()> {
        let beside = self.beside();
        fs::write(&beside, text)?;
        fs::rename(&beside, &self.path).inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
    }

    /// A name that no collector takes for one of its own.
    fn beside(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{}", std::process::id()));
        name.into()
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use scheduler::{Meter, MeterOptions, SchedMode};

    use super::*;

    fn sample() -> VmMeter {
        let options = MeterOptions::new("web", SchedMode::Root, 2, &["port_read"]);
        let meter = Meter::new(options);
        meter.vp(0).expect("a vCPU").attach();
        meter.sample()
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("rota-metrics-{}-{name}", std::process::id()))
    }

    #[test]
    fn the_file_is_there_from_the_start_and_goes_with_the_machine() {
        let path = scratch("web.prom");
        let mut file = MetricsFile::create(&path).expect("a file");
        assert_eq!(fs::read_to_string(&path).expect("empty"), "");
        file.tick(sample);
        let text = fs::read_to_string(&path).expect("metrics");
        assert!(
            text.contains("rota_vcpu_run_seconds_total{vm=\"web\",vcpu=\"0\"} "),
            "{text}"
        );
        assert!(
            !file.beside().exists(),
            "nothing but the file itself is left"
        );
        file.tick(|| unreachable!("a second has not passed"));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_name_that_ends_in_json_gets_json() {
        let path = scratch("web.json");
        let mut file = MetricsFile::create(&path).expect("a file");
        let before = sample();
        file.tick(|| before.clone());
        let read: VmMeter =
            serde_json::from_slice(&fs::read(&path).expect("metrics")).expect("JSON");
        assert_eq!(read, before);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_at_once() {
        assert!(MetricsFile::create(Path::new("/does/not/exist/web.prom")).is_err());
    }
}
