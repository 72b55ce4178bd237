package driver

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Machines is what a keeper needs of the host's VM launcher (vmhook/agent).
type Machines interface {
	// Start starts a VM, paused if that is desired; status.Exists if it runs.
	Start(ctx context.Context, vm *pb.VM) error
	// Stop ends a VM; status.NotFound if it does not run.
	Stop(ctx context.Context, name string, force bool) error
	Pause(ctx context.Context, name string) error
	Resume(ctx context.Context, name string) error
}

// Meta is what a keeper needs of the metadata service (meta/client).
type Meta interface {
	Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error)
	Query(ctx context.Context, q *pb.QueryRequest) (*pb.QueryReply, error)
}

// KeeperConfig is what a keeper works with.
type KeeperConfig struct {
	Host     string
	Machines Machines
	Mover    Mover // nil: VMs move by stop and start only
	Meta     Meta
	Log      *slog.Logger     // nil: slog.Default()
	Now      func() time.Time // nil: time.Now
}

const (
	defaultQuantumMs = 60_000
	startWait        = 60 * time.Second
	stopWait         = 60 * time.Second // for a guest to shut down by itself before it is ended
	bindWait         = 10 * time.Second
	heldWait         = time.Minute // for another host to let a volume go; longer than a lease
)

// Keeper carries out on one host what was decided for its VMs: starts and stops
// them, and gives batch VMs their turns. It hears of it in the answers to the
// host's heartbeats, and acts on nothing else, so that a lost answer is repaired
// by the next.
type Keeper struct {
	cfg  KeeperConfig
	wake chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	latest *pb.RenewReply
	busy   map[string]bool // VMs being started or stopped
	held   map[string]held // VMs that wait for a volume another host has
}

// held is a start that waits for a volume.
type held struct {
	revision uint64
	since    time.Time
}

// NewKeeper returns a keeper that has heard nothing; Run makes it act.
func NewKeeper(cfg KeeperConfig) *Keeper {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Keeper{cfg: cfg, wake: make(chan struct{}, 1), busy: map[string]bool{}, held: map[string]held{}}
}

// Heard brings the answer to a heartbeat. It does not wait.
func (k *Keeper) Heard(rep *pb.RenewReply) {
	if len(rep.Vms)+len(rep.NotHere) == 0 {
		return
	}
	k.mu.Lock()
	k.latest = rep
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Run acts until the context ends, and then waits for what it has begun.
func (k *Keeper) Run(ctx context.Context) {
	defer k.wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.wake:
		}
		k.mu.Lock()
		rep := k.latest
		k.latest = nil
		k.mu.Unlock()
		if rep != nil {
			k.act(ctx, rep)
		}
	}
}

func (k *Keeper) act(ctx context.Context, rep *pb.RenewReply) {
	for _, vm := range rep.Vms {
		if vm.GetQueue().GetStep() == "" || !k.begin(vm.Name) {
			continue
		}
		k.wg.Go(func() {
			defer k.end(vm.Name)
			k.step(ctx, vm)
		})
	}
	for _, name := range rep.NotHere {
		if k.begin(name) {
			k.wg.Go(func() {
				defer k.end(name)
				k.unwanted(ctx, name)
			})
		}
	}
	k.turns(ctx, rep)
}

// step does what the VM's step asks of this host.
func (k *Keeper) step(ctx context.Context, vm *pb.VM) {
	switch {
	case vm.Queue.Step == state.StepStarting:
		k.start(ctx, vm)
	case vm.Queue.Step == state.StepEvicting && k.live(vm):
		k.bind(ctx, vm, vm.Host, "running", &pb.VMQueue{Step: state.StepMigrating, NextHost: vm.Queue.NextHost, Cold: true, Reason: vm.Queue.Reason})
	case vm.Queue.Step == state.StepEvicting:
		k.evict(ctx, vm)
	case k.cfg.Mover == nil:
	case vm.Queue.Step == state.StepMigrating:
		k.migrate(ctx, vm)
	case vm.Queue.Step == state.StepSwitched && vm.Host != k.cfg.Host:
		k.settle(ctx, vm)
	case vm.Queue.Step == state.StepReturning:
		k.comeBack(ctx, vm)
	case vm.Queue.Step == state.StepLanded:
		_ = k.land(ctx, vm) // it has logged why not
	}
}

// live reports whether a VM that has to leave is to be moved with its memory: the
// host it goes to is known, and that was not tried in vain.
func (k *Keeper) live(vm *pb.VM) bool {
	return k.cfg.Mover != nil && vm.Queue.NextHost != "" && !vm.Queue.Cold && !vm.Queue.Sliced
}

func (k *Keeper) begin(vm string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.busy[vm] {
		return false
	}
	k.busy[vm] = true
	return true
}

func (k *Keeper) end(vm string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.busy, vm)
}

// start starts a VM that was bound here. What may work later is tried again at
// the next heartbeat; a VM that cannot be started is stopped, with the reason.
func (k *Keeper) start(ctx context.Context, vm *pb.VM) {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	def := proto.Clone(vm).(*pb.VM)
	if vm.Queue.Sliced {
		def.Desired = "paused"
	}
	err := k.cfg.Machines.Start(ctx, def)
	if !errors.Is(err, status.Held) {
		k.mu.Lock()
		delete(k.held, vm.Name)
		k.mu.Unlock()
	}
	switch {
	case err == nil || errors.Is(err, status.Exists):
		if !k.bind(ctx, vm, vm.Host, "running", &pb.VMQueue{Sliced: vm.Queue.Sliced, Reason: vm.Queue.Reason}) {
			k.unwanted(ctx, vm.Name)
		}
	case errors.Is(err, status.Unavailable), errors.Is(err, status.Timeout), errors.Is(err, status.Shutdown), ctx.Err() != nil,
		errors.Is(err, status.Held) && k.waits(vm):
		k.cfg.Log.Warn("a VM is not started yet", "vm", vm.Name, "err", err)
	default:
		k.cfg.Log.Error("a VM cannot be started", "vm", vm.Name, "err", err)
		k.bind(ctx, vm, "", "stopped", &pb.VMQueue{Reason: "host " + k.cfg.Host + " could not start it: " + err.Error()})
	}
}

// waits says whether a VM whose volume another host has is to be tried again: a
// host that came back gives the volumes of machines that moved away back soon.
func (k *Keeper) waits(vm *pb.VM) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := k.held[vm.Name]
	if h.revision != vm.Revision {
		h = held{vm.Revision, k.cfg.Now()}
		k.held[vm.Name] = h
	}
	if k.cfg.Now().Sub(h.since) < heldWait {
		return true
	}
	delete(k.held, vm.Name)
	return false
}

// unwanted ends a VM that was stopped, or sent elsewhere, while it started or
// while this host was not heard of.
func (k *Keeper) unwanted(ctx context.Context, name string) {
	rep, err := k.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
	gone := errors.Is(err, status.NotFound)
	if !gone && (err != nil || len(rep.Vms) != 1) {
		return // still starting, as far as is known: the next heartbeat tries again
	}
	if !gone && state.HasMachine(rep.Vms[0], k.cfg.Host) && rep.Vms[0].Desired != "stopped" {
		return
	}
	k.cfg.Log.Warn("a VM that is no longer this host's is ended", "vm", name)
	if err := k.cfg.Machines.Stop(ctx, name, true); err != nil && !errors.Is(err, status.NotFound) {
		k.cfg.Log.Error("a VM that is no longer wanted here cannot be stopped", "vm", name, "err", err)
	}
}

// evict stops a VM that has to leave, and sends it on.
func (k *Keeper) evict(ctx context.Context, vm *pb.VM) {
	soft, cancel := context.WithTimeout(ctx, stopWait)
	err := k.cfg.Machines.Stop(soft, vm.Name, false)
	cancel()
	if err != nil && !errors.Is(err, status.NotFound) && ctx.Err() == nil {
		k.cfg.Log.Warn("a VM that has to leave does not shut down and is ended", "vm", vm.Name, "err", err)
		err = k.cfg.Machines.Stop(ctx, vm.Name, true)
	}
	if err != nil && !errors.Is(err, status.NotFound) {
		k.cfg.Log.Error("a VM that has to leave cannot be stopped", "vm", vm.Name, "err", err)
		return // the next heartbeat tries again
	}
	ctx, cancel = context.WithTimeout(ctx, bindWait)
	defer cancel()
	if next := vm.Queue.NextHost; next != "" && k.bind(ctx, vm, next, "running", &pb.VMQueue{Step: state.StepStarting, Reason: vm.Queue.Reason}) {
		return
	}
	k.bind(ctx, vm, "", "running", &pb.VMQueue{Step: state.StepQueued, Reason: vm.Queue.Reason})
}

// bind commits where a VM is. A lost race is no error: the next heartbeat tells.
func (k *Keeper) bind(ctx context.Context, vm *pb.VM, host, desired string, q *pb.VMQueue) bool {
	_, err := k.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: host, Desired: desired, Queue: q}}})
	if err != nil && !errors.Is(err, status.Conflict) && ctx.Err() == nil {
		k.cfg.Log.Warn("a VM's step is not noted", "vm", vm.Name, "err", err)
	}
	return err == nil
}

// turns pauses the batch VMs whose turn is over, and then lets those go on whose
// turn it is: at no moment are more processors promised than there are.
func (k *Keeper) turns(ctx context.Context, rep *pb.RenewReply) {
	byName := map[string]*pb.VM{}
	var jobs []*placement.Job
	for _, vm := range rep.Vms {
		if vm.GetQueue().GetStep() == "" && vm.GetNeeds().GetBatch() {
			byName[vm.Name] = vm
			jobs = append(jobs, &placement.Job{Name: vm.Name, Batch: true, Need: placement.Amounts(state.Need(vm))})
		}
	}
	quantum := rep.QuantumMs
	if quantum == 0 {
		quantum = defaultQuantumMs
	}
	run, pause := placement.Slices(jobs, rep.BatchCpuMillis, quantum, k.cfg.Now().UnixMilli())
	ctx, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	for _, j := range pause {
		if vm := byName[j.Name]; !vm.GetQueue().GetSliced() {
			k.pause(ctx, vm)
		}
	}
	for _, j := range run {
		if vm := byName[j.Name]; vm.GetQueue().GetSliced() {
			k.resume(ctx, vm)
		}
	}
}

func (k *Keeper) pause(ctx context.Context, vm *pb.VM) {
	if err := k.cfg.Machines.Pause(ctx, vm.Name); err != nil {
		k.cfg.Log.Warn("a batch VM whose turn is over is not paused", "vm", vm.Name, "err", err)
		return
	}
	k.bind(ctx, vm, vm.Host, "running", &pb.VMQueue{Sliced: true, Reason: "waits for its turn"})
}

func (k *Keeper) resume(ctx context.Context, vm *pb.VM) {
	res, err := k.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: vm.Host, Desired: "running",
		Queue: &pb.VMQueue{Reason: "has its turn"}}}})
	if err != nil {
		return // others have not let go of the processors yet, or it was changed: the next heartbeat tells
	}
	if err := k.cfg.Machines.Resume(ctx, vm.Name); err != nil {
		k.cfg.Log.Warn("a batch VM is not resumed", "vm", vm.Name, "err", err)
		k.bind(ctx, res.Vm, vm.Host, "running", &pb.VMQueue{Sliced: true, Reason: "waits for its turn"})
	}
}

// Rebooted hears that a machine ended because its host was restarted: it is
// started again here, if nobody has started it elsewhere.
func (k *Keeper) Rebooted(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	if vm := k.ours(ctx, name); vm != nil {
		k.bind(ctx, vm, vm.Host, "running", &pb.VMQueue{Step: state.StepStarting, Reason: "host " + k.cfg.Host + " was restarted"})
	}
}

// Ended hears that a machine has ended by itself. A batch VM is then finished
// and its room free; others stay where they are, to be started again.
func (k *Keeper) Ended(ctx context.Context, name, why string) {
	ctx, cancel := context.WithTimeout(ctx, bindWait)
	defer cancel()
	if vm := k.ours(ctx, name); vm.GetNeeds().GetBatch() {
		k.bind(ctx, vm, "", "stopped", &pb.VMQueue{Reason: "ended: " + why})
	}
}

// ours returns a VM that is to run here and on whose way nobody is; else nil.
func (k *Keeper) ours(ctx context.Context, name string) *pb.VM {
	rep, err := k.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
	if err != nil || len(rep.Vms) != 1 {
		return nil // removed, or to be seen in `cairn vm ls`
	}
	if vm := rep.Vms[0]; vm.Host == k.cfg.Host && vm.Desired == "running" && vm.GetQueue().GetStep() == "" {
		return vm
	}
	return nil
}
