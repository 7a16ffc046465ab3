//! libvirt's `<cputune>` as a policy: every element is either mapped, and how, or named as one that cannot be.

use roxmltree::{Document, Node};
use serde::{Deserialize, Serialize};

use super::{Cap, Count, Helpers, Placement, VmPolicy, validate::WEIGHT};
use crate::{CpuSet, Placement::Map};

/// What came of a `<cputune>`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// The policy.
    pub policy: VmPolicy,
    /// vCPUs, where a `<vcpu>` says how many.
    pub vcpus: Option<u32>,
    /// What was mapped, and to what.
    pub mapped: Vec<String>,
    /// What could not be, and why.
    pub unmapped: Vec<String>,
}

/// XML that is no domain and no `<cputune>`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// It is no XML.
    #[error("not XML: {0}")]
    Xml(String),
    /// It has neither.
    #[error("neither a <cputune> nor a <domain> with one")]
    NoCputune,
    /// An attribute that cannot be read.
    #[error("<{element}>: {what}")]
    Value {
        /// Where.
        element: String,
        /// What is wrong with it.
        what: String,
    },
}

/// Shares of a group of version 1 that asks for nothing; 100 is that weight here.
const USUAL_SHARES: u64 = 1024;
/// libvirt's period where only a quota is given, in microseconds.
const USUAL_PERIOD_US: u64 = 100_000;

/// Reads a `<cputune>`, alone or in its `<domain>`. `vcpus` is how many there are where no `<vcpu>` says so: libvirt counts
/// quotas for each vCPU, here they are for all of a VM. `cgroup` is the version of control groups the domain is for: libvirt writes
/// `<shares>` into `cpu.shares` of version 1, and as they are into `cpu.weight` of version 2.
///
/// # Errors
///
/// The text is no XML, has no `<cputune>`, or has values that cannot be read.
pub fn import(xml: &str, vcpus: u32, cgroup: u8) -> Result<Import, ImportError> {
    let document = Document::parse(xml).map_err(|error| ImportError::Xml(error.to_string()))?;
    let root = document.root_element();
    let child = |name: &str| root.children().find(|node| node.has_tag_name(name));
    let cputune = if root.has_tag_name("cputune") {
        Some(root)
    } else {
        child("cputune")
    };
    let vcpu = child("vcpu");
    if cputune.is_none() && vcpu.is_none() {
        return Err(ImportError::NoCputune);
    }
    let mut reading = Reading::default();
    if let Some(vcpu) = vcpu {
        reading.vcpu(vcpu)?;
    }
    let elements = cputune.into_iter().flat_map(|node| node.children());
    for element in elements.filter(Node::is_element) {
        reading.element(element, cgroup)?;
    }
    let vcpus = reading.import.vcpus.unwrap_or(vcpus).max(1);
    Ok(reading.finish(vcpus))
}

/// An import in the making.
#[derive(Default)]
struct Reading {
    import: Import,
    everywhere: Option<CpuSet>,
    pins: Vec<(u32, CpuSet)>,
    helpers: Option<CpuSet>,
    quota: Option<u64>,
    period: Option<u64>,
    global_quota: Option<u64>,
    global_period: Option<u64>,
    scheduled: Vec<(CpuSet, u8)>,
}

impl Reading {
    fn vcpu(&mut self, node: Node<'_, '_>) -> Result<(), ImportError> {
        let most: u32 = number(node, text(node))?;
        let current = match node.attribute("current") {
            Some(current) => number(node, current)?,
            None => most,
        };
        if current == 0 || current > most {
            let what = format!("current='{current}' is not 1 to {most}");
            return Err(value(node, what));
        }
        if current < most {
            self.mapped(
                &format!("<vcpu current='{current}'>{most}"),
                &format!("boot={current},max={most}; planned are those at the start"),
            );
        }
        self.import.vcpus = Some(current);
        if node.attribute("placement") == Some("auto") {
            let (require, node) = (false, None);
            self.import.policy.placement = Placement::NumaLocal { require, node };
            self.mapped("<vcpu placement='auto'>", "placement=numa-local");
        }
        if let Some(cpuset) = node.attribute("cpuset") {
            self.everywhere = Some(list(node, cpuset)?);
        }
        Ok(())
    }

    fn element(&mut self, node: Node<'_, '_>, cgroup: u8) -> Result<(), ImportError> {
        let name = node.tag_name().name();
        match name {
            "vcpupin" => {
                let vcpu = attribute(node, "vcpu")?;
                let pin = (number(node, vcpu)?, list(node, attribute(node, "cpuset")?)?);
                self.pins.push(pin);
            }
            "emulatorpin" | "iothreadpin" => {
                let cpus = list(node, attribute(node, "cpuset")?)?;
                self.helpers.get_or_insert_default().add(&cpus);
            }
            "shares" => self.shares(number(node, text(node))?, cgroup),
            "quota" => self.quota = limit(node)?,
            "period" => self.period = limit(node)?,
            "global_quota" => self.global_quota = limit(node)?,
            "global_period" => self.global_period = limit(node)?,
            "vcpusched" => self.vcpusched(node)?,
            "emulator_quota" | "emulator_period" | "iothread_quota" | "iothread_period" => {
                self.unmapped(name, "there is one cap, for all vCPUs together: cap=");
            }
            "iothreadsched" | "emulatorsched" => {
                self.unmapped(name, "only vCPUs have a real-time priority: rt=");
            }
            "cachetune" | "memorytune" => self.unmapped(name, "resctrl is not used"),
            _ => self.unmapped(name, "unknown"),
        }
        Ok(())
    }

    fn shares(&mut self, shares: u64, cgroup: u8) {
        let (exact, why) = match cgroup {
            2 => (
                shares,
                "in control groups of version 2 they are the weight".to_owned(),
            ),
            _ => (
                shares.saturating_mul(100) / USUAL_SHARES,
                format!("in control groups of version 1 {USUAL_SHARES} shares are 100"),
            ),
        };
        let weight = exact.clamp((*WEIGHT.start()).into(), (*WEIGHT.end()).into());
        let nearest = match weight == exact {
            true => "",
            false => ", and this is the nearest there is",
        };
        self.import.policy.weight = u32::try_from(weight).ok();
        self.mapped(
            &format!("<shares>{shares}"),
            &format!("weight={weight} ({why}{nearest})"),
        );
    }

    fn vcpusched(&mut self, node: Node<'_, '_>) -> Result<(), ImportError> {
        let scheduler = attribute(node, "scheduler")?;
        match scheduler {
            "fifo" => {
                let priority = number(node, attribute(node, "priority")?)?;
                // Without a list it is for all.
                let vcpus = match node.attribute("vcpus") {
                    Some(vcpus) => list(node, vcpus)?,
                    None => CpuSet::first(CpuSet::LIMIT),
                };
                self.scheduled.push((vcpus, priority));
            }
            "rr" => self.unmapped("vcpusched scheduler='rr'", "the kernel's quantum is one for the whole host; rotate= takes turns in a quantum of its own"),
            "batch" => self.unmapped("vcpusched scheduler='batch'", "it delays wakers; slice=throughput gives long turns without that"),
            "idle" => self.unmapped("vcpusched scheduler='idle'", "weight=1 is nearest"),
            other => {
                let what = format!("scheduler='{other}'");
                return Err(value(node, what));
            }
        }
        Ok(())
    }

    fn finish(mut self, vcpus: u32) -> Import {
        self.places(vcpus);
        self.caps(vcpus);
        self.priorities(vcpus);
        if let Some(cpus) = self.helpers.take() {
            self.mapped(
                "<emulatorpin>, <iothreadpin>",
                &format!("helpers=[{cpus}], one set for all threads that are not vCPUs"),
            );
            self.import.policy.helpers = Helpers::Set(cpus);
        }
        self.import
    }

    fn places(&mut self, vcpus: u32) {
        let mut map = std::mem::take(&mut self.pins);
        // libvirt takes the last of several; so does this.
        map.reverse();
        let mut seen = std::collections::BTreeSet::new();
        map.retain(|(vcpu, _)| seen.insert(*vcpu));
        map.sort_by_key(|(vcpu, _)| *vcpu);
        if let Some(everywhere) = self.everywhere.take() {
            let rest = (0..vcpus).filter(|vcpu| !seen.contains(vcpu));
            map.extend(rest.map(|vcpu| (vcpu, everywhere.clone())));
            map.sort_by_key(|(vcpu, _)| *vcpu);
            self.mapped(
                "<vcpu cpuset>",
                "those CPUs for every vCPU without a <vcpupin>",
            );
        }
        let beyond: Vec<u32> = map
            .iter()
            .map(|(vcpu, _)| *vcpu)
            .filter(|vcpu| *vcpu >= vcpus)
            .collect();
        for vcpu in beyond {
            self.unmapped(
                &format!("vcpupin vcpu='{vcpu}'"),
                &format!("this VM has {} at the start", Count(vcpus, "vCPU")),
            );
        }
        map.retain(|(vcpu, _)| *vcpu < vcpus);
        if !map.is_empty() {
            self.mapped("<vcpupin>", "placement=map");
            self.import.policy.placement = Map(map);
        }
    }

    fn caps(&mut self, vcpus: u32) {
        let each = self.quota.map(|quota| Cap {
            quota_us: quota.saturating_mul(u64::from(vcpus)),
            period_us: self.period.unwrap_or(USUAL_PERIOD_US),
            burst_us: 0,
        });
        let all = self.global_quota.map(|quota_us| Cap {
            quota_us,
            period_us: self.global_period.unwrap_or(USUAL_PERIOD_US),
            burst_us: 0,
        });
        if let Some(cap) = each {
            self.mapped(
                "<quota>, <period>",
                &format!(
                    "cap={cap}, which is as much for {} together",
                    Count(vcpus, "vCPU")
                ),
            );
        }
        if let Some(cap) = all {
            self.mapped(
                "<global_quota>, <global_period>",
                &format!(
                    "cap={cap}, which is for vCPUs alone: the VM's other threads are not in it"
                ),
            );
        }
        for (period, cap, name) in [
            (self.period, each, "period"),
            (self.global_period, all, "global_period"),
        ] {
            if period.is_some() && cap.is_none() {
                self.unmapped(name, "it limits nothing without a quota");
            }
        }
        let tightest = each
            .into_iter()
            .chain(all)
            .min_by_key(|cap| cap.millicpus());
        if each.is_some() && all.is_some() {
            self.import
                .unmapped
                .push("of two caps the tighter is taken".to_owned());
        }
        self.import.policy.cap = tightest;
    }

    fn priorities(&mut self, vcpus: u32) {
        let scheduled = std::mem::take(&mut self.scheduled);
        let Some((_, priority)) = scheduled.first().cloned() else {
            return;
        };
        let same = scheduled.iter().all(|(_, other)| *other == priority);
        let all = scheduled
            .iter()
            .fold(CpuSet::new(), |all, (cpus, _)| &all | cpus);
        if same && CpuSet::first(vcpus).is_subset(&all) {
            self.import.policy.rt = Some(priority);
            self.mapped("<vcpusched scheduler='fifo'>", &format!("rt={priority}"));
        } else {
            self.unmapped(
                "vcpusched scheduler='fifo'",
                "rt= is for all vCPUs of a VM and of one priority",
            );
        }
    }

    fn mapped(&mut self, what: &str, to: &str) {
        self.import.mapped.push(format!("{what}: {to}"));
    }

    fn unmapped(&mut self, what: &str, why: &str) {
        self.import.unmapped.push(format!("<{what}>: {why}"));
    }
}

fn value(node: Node<'_, '_>, what: String) -> ImportError {
    ImportError::Value {
        element: node.tag_name().name().to_owned(),
        what,
    }
}

fn text<'a>(node: Node<'a, '_>) -> &'a str {
    node.text().unwrap_or_default().trim()
}

fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Result<&'a str, ImportError> {
    node.attribute(name)
        .ok_or_else(|| value(node, format!("has no {name}")))
}

fn number<T: std::str::FromStr>(node: Node<'_, '_>, text: &str) -> Result<T, ImportError> {
    text.parse().map_err(|_| {
        value(
            node,
            format!("'{text}' is not a number that is possible here"),
        )
    })
}

/// A quota or a period; 0 and negative ones mean none.
fn limit(node: Node<'_, '_>) -> Result<Option<u64>, ImportError> {
    let number: i64 = number(node, text(node))?;
    Ok(u64::try_from(number).ok().filter(|number| *number > 0))
}

/// libvirt's lists are the kernel's, and `^` takes out again.
fn list(node: Node<'_, '_>, text: &str) -> Result<CpuSet, ImportError> {
    let mut cpus = CpuSet::new();
    for part in text.split(',') {
        let part = part.trim();
        let (out, part) = match part.strip_prefix('^') {
            Some(part) => (true, part),
            None => (false, part),
        };
        let part: CpuSet = part
            .parse()
            .map_err(|error| value(node, format!("{error}")))?;
        if out {
            cpus.subtract(&part);
        } else {
            cpus.add(&part);
        }
    }
    if cpus.is_empty() {
        return Err(value(node, format!("'{text}' has no CPU")));
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_with_everything() {
        let import = import(
            "<domain type='kvm'><name>db</name>
               <vcpu placement='static' cpuset='0-7,^3'>4</vcpu>
               <cputune>
                 <vcpupin vcpu='0' cpuset='1-4,^2'/>
                 <vcpupin vcpu='1' cpuset='0,1'/>
                 <emulatorpin cpuset='1-3'/>
                 <iothreadpin iothread='1' cpuset='5,6'/>
                 <shares>2048</shares>
                 <period>10000</period>
                 <quota>5000</quota>
                 <emulator_period>1000000</emulator_period>
                 <emulator_quota>-1</emulator_quota>
                 <vcpusched vcpus='0-3' scheduler='fifo' priority='1'/>
                 <iothreadsched iothreads='1' scheduler='batch'/>
                 <cachetune vcpus='0-3'/>
                 <something/>
               </cputune></domain>",
            1,
            1,
        )
        .expect("reads");
        assert_eq!(import.vcpus, Some(4));
        assert_eq!(
            import.policy.to_string(),
            "placement=map,map=[0@[1,3-4],1@[0-1],2@[0-2,4-7],3@[0-2,4-7]],weight=200,cap=20ms:10ms,rt=1,helpers=[1-3,5-6]"
        );
        assert_eq!(import.unmapped.len(), 5, "{:?}", import.unmapped);
        assert!(
            import
                .unmapped
                .iter()
                .any(|text| text.contains("cachetune"))
        );
        assert_eq!(import.mapped.len(), 6, "{:?}", import.mapped);
    }

    #[test]
    fn a_cputune_alone() {
        let read = |xml: &str| import(xml, 2, 1).map(|import| import.policy.to_string());
        assert_eq!(read("<cputune/>"), Ok("placement=shared".to_owned()));
        assert_eq!(
            read("<cputune><quota>-1</quota></cputune>"),
            Ok("placement=shared".to_owned())
        );
        assert_eq!(
            read("<cputune><global_quota>50000</global_quota><quota>40000</quota></cputune>"),
            Ok("placement=shared,cap=50ms:100ms".to_owned())
        );
        assert_eq!(
            import("<domain><vcpu placement='auto'>2</vcpu></domain>", 1, 2)
                .map(|import| import.policy.placement),
            Ok(Placement::NumaLocal {
                require: false,
                node: None
            })
        );
    }

    #[test]
    fn shares_are_what_libvirt_makes_of_them() {
        for (cgroup, shares, weight) in [
            (1, 1024, 100),
            (1, 2048, 200),
            (1, 1, 1),
            (1, u64::MAX, 10_000),
            (2, 100, 100),
            (2, 1024, 1024),
            (2, 0, 1),
            (2, 262_144, 10_000),
        ] {
            let xml = format!("<cputune><shares>{shares}</shares></cputune>");
            let import = import(&xml, 1, cgroup).expect("reads");
            assert_eq!(import.policy.weight, Some(weight), "{shares}, {cgroup}");
            let moved = import.mapped[0].contains("nearest");
            assert_eq!(moved, [1, 10_000].contains(&weight), "{import:?}");
        }
    }

    #[test]
    fn vcpus_that_are_not_there_at_the_start_are_said() {
        let import = import(
            "<domain><vcpu current='2'>4</vcpu>
               <cputune><quota>40000</quota><vcpupin vcpu='3' cpuset='0'/></cputune></domain>",
            1,
            2,
        )
        .expect("reads");
        assert_eq!(import.vcpus, Some(2));
        assert_eq!(import.policy.to_string(), "placement=shared,cap=80ms:100ms");
        assert!(import.mapped[0].contains("boot=2,max=4"), "{import:?}");
        assert!(import.unmapped[0].contains("2 vCPUs"), "{import:?}");
    }

    #[test]
    fn a_period_without_a_quota_is_not_mapped() {
        for name in ["period", "global_period"] {
            let xml = format!("<cputune><{name}>50000</{name}></cputune>");
            let import = import(&xml, 1, 2).expect("reads");
            assert_eq!(import.policy.cap, None);
            assert!(import.unmapped[0].contains(name), "{import:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for bad in [
            "",
            "<domain/>",
            "<cputune>",
            "<!DOCTYPE a [<!ENTITY b 'c'>]><cputune/>",
            "<cputune><vcpupin vcpu='0'/></cputune>",
            "<cputune><vcpupin vcpu='x' cpuset='1'/></cputune>",
            "<cputune><vcpupin vcpu='0' cpuset='1,^1'/></cputune>",
            "<cputune><vcpupin vcpu='0' cpuset='5000'/></cputune>",
            "<cputune><shares>-1</shares></cputune>",
            "<domain><vcpu current='3'>2</vcpu></domain>",
            "<domain><vcpu current='0'>2</vcpu></domain>",
            "<cputune><vcpusched scheduler='deadline'/></cputune>",
            "<cputune><vcpusched scheduler='fifo'/></cputune>",
        ] {
            assert!(import(bad, 1, 2).is_err(), "{bad}");
        }
    }
}
