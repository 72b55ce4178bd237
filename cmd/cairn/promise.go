package main

import (
	"context"
	"fmt"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/vmhook/agent"
)

// promiseConfig is what a host's file says of its VMs' resources beyond
// processors and memory, and how often each may be promised.
type promiseConfig struct {
	VMDisk           string   `toml:"vm_disk"`           // local disk for VMs
	VMBandwidth      string   `toml:"vm_bandwidth"`      // of disk traffic a second, for VMs
	Networks         []string `toml:"networks"`          // storage networks it reaches
	CPUPercent       uint32   `toml:"cpu_percent"`       // of the processors that may be promised (100)
	MemoryPercent    uint32   `toml:"memory_percent"`    // (100)
	DiskPercent      uint32   `toml:"disk_percent"`      // (100)
	BandwidthPercent uint32   `toml:"bandwidth_percent"` // (100)

	disk, bandwidth uint64
}

// percentMax bounds over-commitment: a hundred times.
const percentMax = 10_000

func (c *promiseConfig) check() (err error) {
	for _, s := range []struct {
		text string
		n    *uint64
	}{{c.VMDisk, &c.disk}, {c.VMBandwidth, &c.bandwidth}} {
		if s.text != "" {
			if *s.n, err = parseSize(s.text); err != nil {
				return err
			}
		}
	}
	for _, p := range []struct {
		name string
		pct  uint32
	}{{"cpu", c.CPUPercent}, {"memory", c.MemoryPercent}, {"disk", c.DiskPercent}, {"bandwidth", c.BandwidthPercent}} {
		if p.pct > percentMax {
			return fmt.Errorf("%s_percent = %d is more than %d", p.name, p.pct, percentMax)
		}
	}
	return nil
}

func (c *promiseConfig) promise() *pb.HostPromise {
	return &pb.HostPromise{DiskBytes: c.disk, BandwidthBytes: c.bandwidth, Networks: c.Networks, CpuPercent: c.CPUPercent,
		MemoryPercent: c.MemoryPercent, DiskPercent: c.DiskPercent, BandwidthPercent: c.BandwidthPercent}
}

// keptVMs is the host's launcher once it knows which VMs outlived the last
// process.
type keptVMs struct{ h *hostd }

func (k keptVMs) known(ctx context.Context) error { return (&control{h: k.h}).ready(ctx) }

// Start implements driver.Machines.
func (k keptVMs) Start(ctx context.Context, vm *pb.VM) error {
	if err := k.known(ctx); err != nil {
		return err
	}
	return k.h.vms.Start(ctx, vm)
}

// Stop implements driver.Machines.
func (k keptVMs) Stop(ctx context.Context, name string, force bool) error {
	if err := k.known(ctx); err != nil {
		return err
	}
	return k.h.vms.Stop(ctx, name, force)
}

// Pause implements driver.Machines.
func (k keptVMs) Pause(ctx context.Context, name string) error {
	if err := k.known(ctx); err != nil {
		return err
	}
	return k.h.vms.Pause(ctx, name)
}

// Resume implements driver.Machines.
func (k keptVMs) Resume(ctx context.Context, name string) error {
	if err := k.known(ctx); err != nil {
		return err
	}
	return k.h.vms.Resume(ctx, name)
}

// vmEnded hears of a machine's end.
func (h *hostd) vmEnded(name, why string) {
	h.moves.ended(name)
	if why == agent.Rebooted {
		h.keeper.Rebooted(context.Background(), name)
		return
	}
	h.keeper.Ended(context.Background(), name, why)
}

// say adds the machines that run here to a heartbeat, once they are known.
func (h *hostd) say(req *pb.RenewRequest) {
	select {
	case <-h.adopted:
		for _, m := range h.vms.List() {
			req.Machines = append(req.Machines, m.Name)
		}
	default:
	}
}
