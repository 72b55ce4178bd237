package server

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// VMs of a host that died are started elsewhere, and those of a drained host
// move away, both by the queue's own means: a compare-and-set on the VM.
//
// Why that is safe: the new host attaches the VM's volumes, which waits for the
// old gateway's lease and fences its writes by the epoch. A host that comes back
// hears that the machines it still runs are not its own, and stops them.

const (
	rescueEvery     = 2 * time.Second
	defaultRestart  = 30 * time.Second
	defaultMovesMax = 4 // VMs on their way at once
)

// rescue sends VMs away from hosts that are gone or drained.
func (c *scheduler) rescue(t *tenure) error {
	now := boottime()
	if now < c.rescued+rescueEvery {
		return nil
	}
	c.rescued = now
	var binds []*pb.BindVM
	said := ""
	err := c.s.fsm.read(func(kv state.KV) {
		if binds, said = t.lost(kv, now); len(binds) == 0 {
			binds = t.drained(kv, now, c.s.cfg.Placer)
		}
	})
	if err != nil {
		return err
	}
	if said != c.silent && said != "" {
		c.s.log.Warn(said)
	}
	c.silent = said
	return c.bindAll(t, binds)
}

// silence is how long nothing was heard of a host; a new leader counts from its
// election.
func (t *tenure) silence(host string, now time.Duration) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if b := t.hosts[host]; b != nil {
		return now - b.at
	}
	return now - t.since
}

// lost puts the VMs of hosts that are gone into the queue. When more than half of
// all hosts are silent and have VMs, it is rather the network, or a whole site
// that starts: nothing is done, and said says so.
func (t *tenure) lost(kv state.KV, now time.Duration) (binds []*pb.BindVM, said string) {
	grace := time.Duration(state.PlacementOf(kv).RestartMs) * time.Millisecond
	if grace < 0 {
		return nil, ""
	}
	if grace == 0 {
		grace = defaultRestart
	}
	hosts, gone := state.Hosts(kv), 0
	for _, h := range hosts {
		silent := t.silence(h.Name, now)
		if silent < grace {
			continue
		}
		n := len(binds)
		for _, vm := range state.VMsOn(kv, h.Name) {
			switch {
			case vm.Desired != "running":
			case vm.Host == h.Name:
				binds = append(binds, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Desired: "running", Queue: &pb.VMQueue{Step: state.StepQueued,
					Reason: fmt.Sprintf("host %s has not been heard of for %d s", h.Name, int(silent.Seconds()))}})
			case vm.GetQueue().GetStep() == state.StepSwitched: // and who was to say how it goes on is gone
				binds = append(binds, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: vm.Host, Desired: "running", Queue: &pb.VMQueue{Step: state.StepLanded, NextHost: h.Name,
					Reason: fmt.Sprintf("host %s, which it comes from, has not been heard of for %d s", h.Name, int(silent.Seconds()))}})
			}
		}
		if len(binds) > n {
			gone++
		}
	}
	if 2*gone > len(hosts) {
		return nil, fmt.Sprintf("%d of %d hosts are silent: their VMs are not started elsewhere, because so many do not fail at once", gone, len(hosts))
	}
	return binds, ""
}

// drained moves the VMs of drained hosts, a few at a time.
func (t *tenure) drained(kv state.KV, now time.Duration, placer Placer) []*pb.BindVM {
	var leave []*pb.VM
	for _, h := range state.Hosts(kv) {
		if !h.Drained || t.silence(h.Name, now) > upFor {
			continue
		}
		for _, vm := range state.VMsOn(kv, h.Name) {
			if vm.Host == h.Name && vm.Desired == "running" && vm.GetQueue().GetStep() == "" {
				leave = append(leave, vm)
			}
		}
	}
	if room := t.movesLeft(kv); len(leave) > 0 && room > 0 {
		return placer.Leave(t.picture(kv, now, nil), leave, room)
	}
	return nil
}

// movesLeft is how many more VMs may be sent on their way.
func (t *tenure) movesLeft(kv state.KV) int {
	left := int(state.PlacementOf(kv).MovesAtOnce)
	if left == 0 {
		left = defaultMovesMax
	}
	for _, vm := range state.VMsUnderway(kv) {
		if s := vm.GetQueue().GetStep(); s == state.StepEvicting || s == state.StepStarting || state.InMotion(vm) {
			left--
		}
	}
	return left
}

// notHere says which of the machines that run on a host are no longer its own.
// One that metadata does not know, or whose volumes came out of a backup nobody
// has vouched for, is left alone: there it is metadata that may be behind.
func notHere(kv state.KV, host string, machines []string) (names []string) {
	for _, name := range machines {
		vm := state.VMByName(kv, name)
		if vm == nil || state.HasMachine(vm, host) {
			continue
		}
		known := true
		for _, disk := range append([]string{vm.Volume}, vm.Disks...) {
			v := state.VolumeByName(kv, disk)
			known = known && v.GetRestoredUnixNs() == 0
		}
		if known {
			names = append(names, name)
		}
	}
	return names
}
