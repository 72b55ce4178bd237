package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A live migration from host A to host B, as the two keepers carry it out. Each
// step is in metadata (meta/state/place.go) before what it allows is done, so that
// a keeper that begins anew, after a crash of its process, goes on from there:
//
//	migrating  A  send the memory; then, the guest standing still, hand all volumes
//	              and the VM over, in one entry     → switched
//	              failed: settled on A, or, where that was allowed, evicting
//	switched   A  finish; B has all of it           → landed
//	              failed                            → returning
//	landed     B  run                               → settled on B
//	              its memory is lost                → starting, from its disks
//	returning  A  end B's machine, take the volumes back, run → settled on A
//
// A says landed only when its own machine has given all away, or is dead; it runs
// again only after it has said returning. Both are compare-and-set on the same
// revision of the VM: one of them happens.

// Mover is what a keeper needs to move machines live: this host's launcher and
// gateway, and the other hosts' (cmd/cairn). Calls may be repeated.
type Mover interface {
	// Send has the other host wait for a VM's memory and sends it, until the guest
	// stands still and all but the last is there. Unsupported: these two hosts'
	// machines cannot take over from each other.
	Send(ctx context.Context, vm *pb.VM, to string) error
	// Switch hands the VM's volumes over with the bind; an error other than Unknown
	// means that they are still here.
	Switch(ctx context.Context, bind *pb.BindVM) error
	// Finish sends what is left. NotFound: the machine is dead.
	Finish(ctx context.Context, vm *pb.VM) error
	// Arrive waits until all of the VM is on the other host.
	Arrive(ctx context.Context, vm *pb.VM, at string) error
	// Tell lets the other host know at once that the VM has landed there.
	Tell(ctx context.Context, vm *pb.VM, at string) error
	// Land lets the VM run here. NotFound: its machine or its memory is lost.
	Land(ctx context.Context, vm *pb.VM) (how string, err error)
	// Abandon ends the machine that waits on the other host.
	Abandon(ctx context.Context, vm *pb.VM, at string) error
	// GoBack takes the VM's volumes back and lets it run here. NotFound: its machine
	// is dead.
	GoBack(ctx context.Context, vm *pb.VM) error
}

const (
	sendWait    = 30 * time.Minute // for all memory; a guest may dirty it as fast as it is sent
	switchWait  = 10 * time.Second // for the volumes to be flushed
	finishWait  = 30 * time.Second
	arriveWait  = 20 * time.Second // while A could return
	abandonWait = 5 * time.Second
	goBackWait  = 60 * time.Second // longer than a lease
	landWait    = 60 * time.Second
)

// migrate sends a VM's memory and hands the VM over.
func (k *Keeper) migrate(ctx context.Context, vm *pb.VM) {
	to := vm.Queue.NextHost
	send, cancel := context.WithTimeout(ctx, sendWait)
	err := k.cfg.Mover.Send(send, vm, to)
	cancel()
	if err != nil {
		k.stays(ctx, vm, err)
		return
	}
	bind := &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: to, Desired: "running",
		Queue: &pb.VMQueue{Step: state.StepSwitched, NextHost: k.cfg.Host, Reason: vm.Queue.Reason, Cold: vm.Queue.Cold}}
	over, cancel := context.WithTimeout(ctx, switchWait)
	err = k.cfg.Mover.Switch(over, bind)
	cancel()
	if err != nil {
		if !errors.Is(err, status.Unknown) { // else the next heartbeat tells
			k.stays(ctx, vm, err)
		}
		return
	}
	vm = proto.Clone(vm).(*pb.VM)
	vm.Host, vm.Queue, vm.Revision = to, bind.Queue, vm.Revision+1 // as the entry has made it
	k.settle(ctx, vm)
}

// stays notes that a VM does not move, and why, before it lets it run on.
func (k *Keeper) stays(ctx context.Context, vm *pb.VM, why error) {
	if ctx.Err() != nil {
		return // the next process sees to it
	}
	to := vm.Queue.NextHost
	k.cfg.Log.Warn("a VM does not move live", "vm", vm.Name, "to", to, "err", why)
	q := &pb.VMQueue{Reason: shorten(fmt.Sprintf("it did not move live to host %s: %v", to, why))}
	if vm.Queue.Cold {
		q = &pb.VMQueue{Step: state.StepEvicting, NextHost: to, Cold: true, Reason: shorten(fmt.Sprintf("%s; it goes by stop and start, for it cannot move live: %v", vm.Queue.Reason, why))}
	}
	note, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	noted := k.bind(note, vm, k.cfg.Host, "running", q)
	if !noted && !k.stayed(note, vm.Name) {
		return // it is not known to stay: the next heartbeat tells
	}
	k.abandon(ctx, vm, to)
	back, cancel := context.WithTimeout(ctx, goBackWait)
	defer cancel()
	if err := k.cfg.Mover.GoBack(back, vm); err != nil && !errors.Is(err, status.NotFound) {
		k.cfg.Log.Error("a VM that did not move does not go on", "vm", vm.Name, "err", err)
	}
}

// stayed asks whether a VM is this host's and on nobody's way.
func (k *Keeper) stayed(ctx context.Context, name string) bool { return k.ours(ctx, name) != nil }

func (k *Keeper) abandon(ctx context.Context, vm *pb.VM, at string) {
	ctx, cancel := context.WithTimeout(ctx, abandonWait)
	defer cancel()
	if err := k.cfg.Mover.Abandon(ctx, vm, at); err != nil && !errors.Is(err, status.NotFound) {
		k.cfg.Log.Warn("the machine that waited for a VM is not ended yet; its host will hear of it", "vm", vm.Name, "host", at, "err", err)
	}
}

// settle says how a switched VM that comes from here goes on.
func (k *Keeper) settle(ctx context.Context, vm *pb.VM) {
	at := vm.Host
	finish, cancel := context.WithTimeout(ctx, finishWait)
	err := k.cfg.Mover.Finish(finish, vm)
	cancel()
	dead := errors.Is(err, status.NotFound)
	if err == nil {
		arrive, cancel := context.WithTimeout(ctx, arriveWait)
		err = k.cfg.Mover.Arrive(arrive, vm, at)
		cancel()
	}
	if ctx.Err() != nil {
		return // the next process sees to it
	}
	ctx, cancel = context.WithTimeout(ctx, goBackWait)
	defer cancel()
	if err != nil && !dead {
		k.cfg.Log.Warn("a VM that was switched returns", "vm", vm.Name, "from", at, "err", err)
		q := &pb.VMQueue{Step: state.StepReturning, NextHost: at, Cold: vm.Queue.Cold, Reason: shorten(fmt.Sprintf("it did not arrive on host %s: %v", at, err))}
		if now := k.bound(ctx, vm, k.cfg.Host, q); now != nil {
			k.comeBack(ctx, now)
		}
		return
	}
	q := &pb.VMQueue{Step: state.StepLanded, NextHost: k.cfg.Host, Reason: vm.Queue.Reason}
	if dead {
		q.Reason = shorten(fmt.Sprintf("its machine on host %s died while it moved", k.cfg.Host))
	}
	now := k.bound(ctx, vm, at, q)
	if now == nil {
		return
	}
	if err := k.cfg.Mover.Tell(ctx, now, at); err != nil {
		k.cfg.Log.Warn("the host a VM has come to does not hear of it at once", "vm", vm.Name, "host", at, "err", err)
	}
	if err := k.cfg.Machines.Stop(ctx, vm.Name, true); err != nil && !errors.Is(err, status.NotFound) {
		k.cfg.Log.Warn("the machine that a VM has left is not ended yet", "vm", vm.Name, "err", err)
	}
}

// bound is bind that returns the VM as it is then; nil: it was not done.
func (k *Keeper) bound(ctx context.Context, vm *pb.VM, host string, q *pb.VMQueue) *pb.VM {
	if !k.bind(ctx, vm, host, "running", q) {
		return nil
	}
	vm = proto.Clone(vm).(*pb.VM)
	vm.Host, vm.Queue, vm.Revision = host, q, vm.Revision+1
	return vm
}

// comeBack lets a VM run here again that was switched to another host.
func (k *Keeper) comeBack(ctx context.Context, vm *pb.VM) {
	k.abandon(ctx, vm, vm.Queue.NextHost)
	ctx, cancel := context.WithTimeout(ctx, goBackWait)
	defer cancel()
	err := k.cfg.Mover.GoBack(ctx, vm)
	switch {
	case err == nil && vm.Queue.Cold:
		k.bind(ctx, vm, k.cfg.Host, "running", &pb.VMQueue{Step: state.StepEvicting, NextHost: vm.Queue.NextHost, Cold: true, Reason: shorten("it goes by stop and start: " + vm.Queue.Reason)})
	case err == nil:
		k.bind(ctx, vm, k.cfg.Host, "running", &pb.VMQueue{Reason: vm.Queue.Reason})
	case errors.Is(err, status.NotFound):
		k.bind(ctx, vm, k.cfg.Host, "running", &pb.VMQueue{Step: state.StepStarting, Reason: shorten("its memory was lost while it moved; it is started from its disks: " + vm.Queue.Reason)})
	default:
		k.cfg.Log.Error("a VM that returns does not go on yet", "vm", vm.Name, "err", err)
	}
}

// Land lets a VM run that has landed here; both the heartbeat and the host it
// comes from say so.
func (k *Keeper) Land(ctx context.Context, vm *pb.VM) error {
	if !k.begin(vm.Name) {
		return status.Errorf(status.Conflict, "VM %s is seen to already", vm.Name)
	}
	defer k.end(vm.Name)
	return k.land(ctx, vm)
}

func (k *Keeper) land(ctx context.Context, vm *pb.VM) error {
	ctx, cancel := context.WithTimeout(ctx, landWait)
	defer cancel()
	now := k.here(ctx, vm.Name)
	if now.GetQueue().GetStep() != state.StepLanded || now.Revision != vm.Revision {
		return status.Errorf(status.Conflict, "VM %s has not landed on host %s, as far as metadata knows", vm.Name, k.cfg.Host)
	}
	how, err := k.cfg.Mover.Land(ctx, vm)
	switch {
	case err == nil:
		k.bind(ctx, vm, k.cfg.Host, "running", &pb.VMQueue{Reason: shorten(fmt.Sprintf("came live from host %s%s", vm.Queue.NextHost, how))})
	case errors.Is(err, status.NotFound):
		k.bind(ctx, vm, k.cfg.Host, "running", &pb.VMQueue{Step: state.StepStarting, Reason: shorten(fmt.Sprintf("its memory was lost while it moved; it is started from its disks: %s", vm.Queue.Reason))})
	default:
		k.cfg.Log.Error("a VM that has landed does not run yet", "vm", vm.Name, "err", err)
	}
	return err
}

// here returns a VM if it is bound to this host, else nil.
func (k *Keeper) here(ctx context.Context, name string) *pb.VM {
	rep, err := k.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
	if err != nil || len(rep.Vms) != 1 || rep.Vms[0].Host != k.cfg.Host {
		return nil
	}
	return rep.Vms[0]
}

// reasonMax keeps a reason within what metadata takes.
const reasonMax = 200

func shorten(text string) string {
	if len(text) > reasonMax {
		return text[:reasonMax] + "…"
	}
	return text
}
