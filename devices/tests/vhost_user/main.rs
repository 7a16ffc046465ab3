//! Devices whose back ends are other processes, driven by a guest's driver.

mod back_end;
mod blk;
mod dpdk;
mod echo;
mod fs;
mod net;
mod peer;
