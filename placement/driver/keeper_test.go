package driver

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// house is a metadata service of one state and a host whose machines are names.
type house struct {
	t *testing.T

	mu   sync.Mutex // guards the fields below
	kv   *state.Mem
	seq  uint64
	runs map[string]string // machine to running or paused
	fail map[string]error  // starts that fail
	hook func(name string) // called in Start

	ended chan string // told of each Stop that ends a machine; nil: nobody
}

func newHouse(t *testing.T) *house {
	h := &house{t: t, kv: state.NewMem(), runs: map[string]string{}, fail: map[string]error{}}
	state.Apply(h.kv, &pb.Command{Session: "s", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	for _, n := range []string{"me", "other"} {
		h.do(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: n, Cpus: 4, MemoryBytes: 16 * gib}}}})
	}
	return h
}

func (h *house) do(cmd *pb.Command) *pb.Result {
	h.t.Helper()
	res, err := h.Do(context.Background(), cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	return res
}

func (h *house) Do(_ context.Context, cmd *pb.Command) (*pb.Result, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seq++
	cmd.Session, cmd.Seq = "s", h.seq
	res := state.Apply(h.kv, cmd)
	return res, status.New(status.Kind(res.Status), res.Detail)
}

func (h *house) Query(_ context.Context, q *pb.QueryRequest) (*pb.QueryReply, error) {
	if vm := h.vm(q.GetVm()); vm != nil {
		return &pb.QueryReply{Vms: []*pb.VM{vm}}, nil
	}
	return nil, status.Errorf(status.NotFound, "no VM")
}

func (h *house) vm(name string) *pb.VM {
	h.mu.Lock()
	defer h.mu.Unlock()
	return state.VMByName(h.kv, name)
}

func (h *house) Start(_ context.Context, vm *pb.VM) error {
	if h.hook != nil {
		h.hook(vm.Name)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.fail[vm.Name]; err != nil {
		return err
	}
	if h.runs[vm.Name] != "" {
		return status.Errorf(status.Exists, "it runs")
	}
	h.runs[vm.Name] = vm.Desired
	return nil
}

func (h *house) Stop(_ context.Context, name string, _ bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.runs[name] == "" {
		return status.Errorf(status.NotFound, "it does not run")
	}
	delete(h.runs, name)
	if h.ended != nil {
		h.ended <- name
	}
	return nil
}

func (h *house) set(name, was, is string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.runs[name] != was {
		return status.Errorf(status.Conflict, "VM %s is %q", name, h.runs[name])
	}
	h.runs[name] = is
	return nil
}

func (h *house) Pause(_ context.Context, name string) error  { return h.set(name, "running", "paused") }
func (h *house) Resume(_ context.Context, name string) error { return h.set(name, "paused", "running") }

func (h *house) keeper(now time.Time) *Keeper {
	return NewKeeper(KeeperConfig{Host: "me", Machines: h, Meta: h, Now: func() time.Time { return now }})
}

// put makes a VM with this place and step.
func (h *house) put(name string, cpus uint32, host string, batch bool, q *pb.VMQueue) *pb.VM {
	h.t.Helper()
	vm := h.do(&pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: name, Cpus: cpus, MemoryBytes: gib, Desired: "stopped", Needs: &pb.VMNeeds{Batch: batch}}}}}).Vm
	return h.do(&pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: name, Revision: vm.Revision, Host: host, Desired: "running", Queue: q}}}).Vm
}

// act lets a keeper hear one answer and waits for what it does.
func act(k *Keeper, rep *pb.RenewReply) {
	k.act(context.Background(), rep)
	k.wg.Wait()
}

func (h *house) check(vm, host, desired, step, machine string) {
	h.t.Helper()
	v := h.vm(vm)
	if v.Host != host || v.Desired != desired || v.GetQueue().GetStep() != step || h.runs[vm] != machine {
		h.t.Errorf("VM %s is %s on %q in step %q and its machine %q; want %s on %q in %q, %q", vm, v.Desired, v.Host, v.GetQueue().GetStep(), h.runs[vm], desired, host, step, machine)
	}
}

func TestKeeperStartsWhatWasBoundHere(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	a := h.put("a", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	h.check("a", "me", "running", "", "running")
	b := h.put("b", 1, "me", true, &pb.VMQueue{Step: state.StepStarting, Sliced: true})
	act(k, &pb.RenewReply{Vms: []*pb.VM{b}})
	h.check("b", "me", "running", "", "paused")
	if !h.vm("b").Queue.Sliced {
		t.Error("the sliced VM has its processors")
	}
	c := h.put("c", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	h.fail["c"] = status.Errorf(status.Invalid, "no kernel")
	act(k, &pb.RenewReply{Vms: []*pb.VM{c}})
	h.check("c", "", "stopped", "", "")
	d := h.put("d", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	h.fail["d"] = status.Errorf(status.Unavailable, "a store is away")
	act(k, &pb.RenewReply{Vms: []*pb.VM{d}})
	h.check("d", "me", "running", state.StepStarting, "") // the next heartbeat tries again
}

// A VM that is stopped while it starts does not run on.
func TestKeeperEndsWhatIsNoLongerWanted(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	a := h.put("a", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	h.hook = func(string) {
		h.do(&pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: "a", Revision: a.Revision, Desired: "stopped"}}})
	}
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	h.check("a", "", "stopped", "", "")
}

func TestKeeperEvicts(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	a := h.put("a", 1, "me", false, &pb.VMQueue{Step: state.StepEvicting})
	h.runs["a"] = "running"
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	h.check("a", "", "running", state.StepQueued, "")
	b := h.put("b", 1, "me", false, &pb.VMQueue{Step: state.StepEvicting, NextHost: "other"})
	act(k, &pb.RenewReply{Vms: []*pb.VM{b}}) // it has ended already
	h.check("b", "other", "running", state.StepStarting, "")
	h.put("full", 3, "other", false, nil)
	c := h.put("c", 1, "me", false, &pb.VMQueue{Step: state.StepEvicting, NextHost: "other"})
	act(k, &pb.RenewReply{Vms: []*pb.VM{c}})
	h.check("c", "", "running", state.StepQueued, "") // no room where it was to go
}

// Batch VMs of 2 processors share 4: in every turn two of five run, all equally
// often, and never are more promised than there are.
func TestKeeperGivesTurns(t *testing.T) {
	h := newHouse(t)
	names := []string{"a", "b", "c", "d", "e"}
	for i, n := range names {
		sliced := i >= 2
		h.put(n, 2, "me", true, &pb.VMQueue{Sliced: sliced})
		h.runs[n] = "running"
		if sliced {
			h.runs[n] = "paused"
		}
	}
	turns := map[string]int{}
	for turn := range 10 {
		k := h.keeper(time.UnixMilli(int64(turn) * 1000))
		rep := &pb.RenewReply{QuantumMs: 1000, BatchCpuMillis: 4000}
		for _, n := range names {
			rep.Vms = append(rep.Vms, h.vm(n))
		}
		act(k, rep)
		var runs []string
		for _, n := range names {
			if h.runs[n] == "running" {
				runs = append(runs, n)
				turns[n]++
			}
			if (h.runs[n] == "paused") != h.vm(n).GetQueue().GetSliced() {
				t.Errorf("turn %d: VM %s is %s and its promise says otherwise", turn, n, h.runs[n])
			}
		}
		if len(runs) != 2 {
			t.Errorf("turn %d: %v run", turn, runs)
		}
	}
	for _, n := range names {
		if turns[n] != 4 {
			t.Errorf("turns %v, want 4 each", turns)
			break
		}
	}
}

func TestBatchVMThatEndsIsFinished(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	h.put("job", 1, "me", true, nil)
	h.put("web", 1, "me", false, nil)
	for _, n := range []string{"job", "web", "nope"} {
		k.Ended(context.Background(), n, "it was shut down")
	}
	h.check("job", "", "stopped", "", "")
	h.check("web", "me", "running", "", "")
}

// The loop acts on what it hears last, and ends with its context.
func TestKeeperRuns(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	started := make(chan string, 8)
	h.hook = func(n string) { started <- n }
	go func() { defer close(done); k.Run(ctx) }()
	var want []string
	for i := range 3 {
		n := fmt.Sprintf("vm%d", i)
		want = append(want, n)
		k.Heard(&pb.RenewReply{Vms: []*pb.VM{h.put(n, 1, "me", false, &pb.VMQueue{Step: state.StepStarting})}})
		select {
		case got := <-started:
			if !slices.Contains(want, got) {
				t.Errorf("started %s", got)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("nothing is started")
		}
	}
	cancel()
	<-done
}

// A machine that metadata has elsewhere is ended; one it has here, or does not
// know, is left alone.
func TestKeeperEndsWhatIsElsewhere(t *testing.T) {
	h := newHouse(t)
	h.ended = make(chan string, 2) // room for one that must not be
	k := h.keeper(time.UnixMilli(0))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); k.Run(ctx) }()
	h.put("moved", 1, "other", false, nil)
	h.put("mine", 1, "me", false, nil)
	h.mu.Lock()
	h.runs["moved"], h.runs["mine"] = "running", "running"
	h.mu.Unlock()
	k.Heard(&pb.RenewReply{NotHere: []string{"moved", "mine"}})
	select {
	case name := <-h.ended:
		if name != "moved" {
			t.Errorf("machine %s is ended", name)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the machine runs on")
	}
	cancel()
	<-done
	h.check("mine", "me", "running", "", "running")
}

// A volume that another host has is waited for, a while; then the VM is stopped.
func TestKeeperWaitsForAHeldVolume(t *testing.T) {
	h := newHouse(t)
	now := time.UnixMilli(0)
	k := NewKeeper(KeeperConfig{Host: "me", Machines: h, Meta: h, Now: func() time.Time { return now }})
	a := h.put("a", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	h.fail["a"] = status.Errorf(status.Held, "another host has it")
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	now = now.Add(heldWait - 1)
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	h.check("a", "me", "running", state.StepStarting, "")
	now = now.Add(1)
	act(k, &pb.RenewReply{Vms: []*pb.VM{a}})
	h.check("a", "", "stopped", "", "")

	b := h.put("b", 1, "me", false, &pb.VMQueue{Step: state.StepStarting})
	h.fail["b"] = h.fail["a"]
	act(k, &pb.RenewReply{Vms: []*pb.VM{b}})
	delete(h.fail, "b")
	act(k, &pb.RenewReply{Vms: []*pb.VM{b}})
	h.check("b", "me", "running", "", "running")
	if len(k.held) > 0 {
		t.Errorf("waits are kept of VMs that run: %v", k.held)
	}
}

// After a restart of its host a VM is started again, unless it is elsewhere.
func TestKeeperStartsAgainAfterARestart(t *testing.T) {
	h := newHouse(t)
	k := h.keeper(time.UnixMilli(0))
	h.put("a", 1, "me", false, nil)
	h.put("b", 1, "other", false, nil)
	k.Rebooted(context.Background(), "a")
	k.Rebooted(context.Background(), "b")
	h.check("a", "me", "running", state.StepStarting, "")
	h.check("b", "other", "running", "", "")
}
