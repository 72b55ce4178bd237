package driver

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// journey is a VM's way from host "me" to host "other" with real keepers and real
// metadata, machines that are states, and one fault at one of the calls.
//
// A machine: running, still (sent, stands still), given (all is sent), arriving,
// whole (all has come), dead. A source whose stream breaks lets its guest run, as
// QEMU does.
type journey struct {
	*house
	machines map[string]string // by host
	holder   string            // of the volume, as the gateways see it
	landed   bool              // the one on "other" has run
	cold     bool              // it was started from its disks
	procs    map[string]*proc

	calls   int // so far
	faultAt int // the call before which, or after which, the fault happens
	fault   string
	happens []string // for a failing run's account
}

// proc is one life of a host's process; a dead one does and learns nothing.
type proc struct {
	j    *journey
	host string
	dead bool
	k    *Keeper
}

func (j *journey) start(host string) {
	p := &proc{j: j, host: host}
	p.k = NewKeeper(KeeperConfig{Host: host, Machines: p, Mover: p, Meta: p})
	j.procs[host] = p
}

// call is made before each call's effect, and after it.
func (j *journey) call(p *proc, name string) error {
	if p.dead {
		return status.Errorf(status.Unavailable, "this process is dead")
	}
	j.calls++
	j.happens = append(j.happens, fmt.Sprintf("%d %s: %s", j.calls, p.host, name))
	if j.calls != j.faultAt {
		return nil
	}
	j.happens = append(j.happens, "   fault: "+j.fault)
	switch j.fault {
	case "an error":
		return status.Errorf(status.Timeout, "as the test wants it")
	case "A's process":
		j.procs["me"].dead = true
		j.broken()
		j.start("me")
	case "B's process":
		j.procs["other"].dead = true
		j.broken()
		j.start("other")
	case "A's machine":
		j.machines["me"] = ""
		j.broken()
	case "B's machine":
		j.machines["other"] = ""
		j.broken()
	}
	if p.dead {
		return status.Errorf(status.Unavailable, "this process is dead")
	}
	return nil
}

// broken is what a cut stream does. What stands still notices when it goes on.
func (j *journey) broken() {
	if j.machines["other"] == "arriving" {
		j.machines["other"] = ""
	}
}

func (p *proc) Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error) {
	if err := p.j.call(p, fmt.Sprintf("commit %v", cmd.GetBindVm().GetQueue())); err != nil {
		return nil, err
	}
	res, err := p.j.Do(ctx, cmd)
	if lost := p.j.call(p, "committed"); lost != nil {
		return nil, status.Errorf(status.Unknown, "the answer is lost: %w", lost)
	}
	return res, err
}

func (p *proc) Query(ctx context.Context, q *pb.QueryRequest) (*pb.QueryReply, error) {
	if err := p.j.call(p, "query"); err != nil {
		return nil, err
	}
	return p.j.Query(ctx, q)
}

func (p *proc) Start(_ context.Context, vm *pb.VM) error {
	if err := p.j.call(p, "start"); err != nil {
		return err
	}
	if m := p.j.machines[p.host]; m == "running" {
		return status.Errorf(status.Exists, "it runs")
	}
	p.j.machines[p.host], p.j.cold, p.j.holder = "running", true, p.host
	return nil
}

func (p *proc) Stop(context.Context, string, bool) error {
	if err := p.j.call(p, "stop"); err != nil {
		return err
	}
	if p.j.machines[p.host] == "" {
		return status.Errorf(status.NotFound, "no machine")
	}
	p.j.machines[p.host] = ""
	return nil
}

func (p *proc) Pause(context.Context, string) error  { return nil }
func (p *proc) Resume(context.Context, string) error { return nil }

func (p *proc) Send(_ context.Context, vm *pb.VM, to string) error {
	if err := p.j.call(p, "send"); err != nil {
		return err
	}
	if p.j.machines[p.host] == "" {
		return status.Errorf(status.NotFound, "no machine")
	}
	p.j.machines[p.host] = "running" // what was left of an earlier attempt
	p.j.machines[to] = "arriving"
	if err := p.j.call(p, "sent"); err != nil {
		return err
	}
	if p.j.machines[p.host] == "" || p.j.machines[to] == "" {
		return status.Errorf(status.Unavailable, "the stream broke")
	}
	p.j.machines[p.host] = "still"
	return nil
}

func (p *proc) Switch(ctx context.Context, bind *pb.BindVM) error {
	if err := p.j.call(p, "switch"); err != nil {
		return err
	}
	v := state.VolumeByName(p.j.kv, "v")
	_, err := p.j.Do(ctx, &pb.Command{Op: &pb.Command_HandOver{HandOver: &pb.HandOver{VolumeId: v.Id, Epoch: v.Epoch, Host: bind.Host, Session: "s", Bind: bind}}})
	if err == nil {
		p.j.holder = bind.Host
	}
	if lost := p.j.call(p, "switched"); lost != nil {
		return status.Errorf(status.Unknown, "the answer is lost: %w", lost)
	}
	return err
}

func (p *proc) Finish(context.Context, *pb.VM) error {
	if err := p.j.call(p, "finish"); err != nil {
		return err
	}
	switch p.j.machines[p.host] {
	case "":
		return status.Errorf(status.NotFound, "no machine")
	case "given":
		return nil
	case "running":
		return status.Errorf(status.Unavailable, "the stream broke")
	}
	if p.j.machines["other"] != "arriving" {
		p.j.machines[p.host] = "running" // by itself
		return status.Errorf(status.Unavailable, "the stream broke")
	}
	p.j.machines[p.host], p.j.machines["other"] = "given", "whole"
	return p.j.call(p, "finished")
}

func (p *proc) Arrive(_ context.Context, _ *pb.VM, at string) error {
	if err := p.j.call(p, "arrive"); err != nil {
		return err
	}
	if p.j.machines[at] != "whole" {
		return status.Errorf(status.NotFound, "it has not come")
	}
	return nil
}

func (p *proc) Tell(ctx context.Context, vm *pb.VM, at string) error {
	if err := p.j.call(p, "tell"); err != nil {
		return err
	}
	return p.j.procs[at].k.Land(ctx, vm)
}

func (p *proc) Land(context.Context, *pb.VM) (string, error) {
	if err := p.j.call(p, "land"); err != nil {
		return "", err
	}
	switch p.j.machines[p.host] {
	case "whole":
		if p.j.machines["me"] == "running" || p.j.machines["me"] == "still" {
			p.j.t.Errorf("it runs on the other host, and here it is %s", p.j.machines["me"])
		}
		p.j.machines[p.host], p.j.landed = "running", true
	case "running":
	default:
		p.j.machines[p.host] = ""
		return "", status.Errorf(status.NotFound, "its memory is lost")
	}
	return "", p.j.call(p, "landed")
}

func (p *proc) Abandon(_ context.Context, _ *pb.VM, at string) error {
	if err := p.j.call(p, "abandon"); err != nil {
		return err
	}
	if m := p.j.machines[at]; m == "arriving" || m == "whole" {
		p.j.machines[at] = ""
	}
	return nil
}

func (p *proc) GoBack(context.Context, *pb.VM) error {
	if err := p.j.call(p, "go back"); err != nil {
		return err
	}
	if p.j.machines[p.host] == "" {
		return status.Errorf(status.NotFound, "no machine")
	}
	if p.j.landed {
		p.j.t.Errorf("it runs here again after it ran on the other host")
	}
	p.j.machines[p.host], p.j.holder = "running", p.host
	return p.j.call(p, "gone back")
}

// beat is a heartbeat's answer.
func (j *journey) beat(host string) {
	vm, rep := j.vm("a"), &pb.RenewReply{}
	if vm.GetQueue().GetStep() != "" && (vm.Host == host || vm.Queue.Step == state.StepSwitched && vm.Queue.NextHost == host) {
		rep.Vms = []*pb.VM{vm}
	}
	if j.machines[host] != "" && !state.HasMachine(vm, host) {
		rep.NotHere = []string{"a"}
	}
	act(j.procs[host].k, rep)
}

// run goes the whole way with one fault, and returns how many calls there were.
func run(t *testing.T, faultAt int, fault string, cold bool) (calls int) {
	j := &journey{house: newHouse(t), machines: map[string]string{"me": "running"}, holder: "me", procs: map[string]*proc{}, faultAt: faultAt, fault: fault}
	for i, h := range []string{"me", "other"} {
		id := make([]byte, 16)
		id[0] = byte(i + 1)
		j.do(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: id, Incarnation: 1, Host: h, CapacityBytes: 1 << 40}}}})
		j.start(h)
	}
	j.do(&pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: "v", SizeBytes: gib, Replicas: 1}}})
	j.do(&pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: "v", Host: "me", Session: "s"}}})
	vm := j.put("a", 1, "me", false, nil)
	j.do(&pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: "a", Revision: vm.Revision, Host: "me", Desired: "running", Queue: &pb.VMQueue{Step: state.StepMigrating, NextHost: "other", Cold: cold}}}})
	for round := 0; round < 12; round++ {
		j.beat("me")
		j.beat("other")
	}
	vm = j.vm("a")
	running := 0
	for _, m := range j.machines {
		if m == "running" {
			running++
		}
	}
	died := fault == "A's machine" || fault == "B's machine"
	ok := vm.GetQueue().GetStep() == "" && (running == 1 && j.machines[vm.Host] == "running" && j.machines[map[string]string{"me": "other", "other": "me"}[vm.Host]] == "" || running == 0 && died)
	if !ok || running == 1 && j.holder != vm.Host || j.cold && !died && !cold {
		t.Errorf("%s at call %d: VM %v, machines %v, volume on %s, started from its disks: %v\n%v", fault, faultAt, vm, j.machines, j.holder, j.cold, j.happens)
	}
	if fault == "" && (vm.Host != "other" || !j.landed) {
		t.Errorf("nothing went wrong, and VM is %v", vm)
	}
	return j.calls
}

// TestAMoveEndsOnOneHost breaks every call of a migration in every way, before it
// is done and after: the VM ends up on exactly one host, with its memory unless its
// only machine died, and never runs where it came from after it ran elsewhere.
func TestAMoveEndsOnOneHost(t *testing.T) {
	for _, cold := range []bool{false, true} {
		calls := run(t, 0, "", cold)
		if calls < 12 {
			t.Fatalf("%d calls", calls)
		}
		for _, fault := range []string{"an error", "A's process", "B's process", "A's machine", "B's machine"} {
			for at := 1; at <= calls; at++ {
				run(t, at, fault, cold)
			}
		}
	}
}

// A VM that has to leave goes live if that is possible, and says why if not.
func TestLeavingLive(t *testing.T) {
	h := newHouse(t)
	j := &journey{house: h, machines: map[string]string{"me": "running"}, procs: map[string]*proc{}}
	j.start("me")
	j.put("a", 1, "me", false, &pb.VMQueue{Step: state.StepEvicting, NextHost: "other", Reason: "drained"})
	j.beat("me")
	vm := j.vm("a")
	if vm.GetQueue().GetStep() != state.StepMigrating || !vm.Queue.Cold || vm.Queue.Reason != "drained" {
		t.Fatalf("it leaves as %v", vm)
	}
	j.fault, j.faultAt = "an error", j.calls+1
	j.beat("me")
	if vm = j.vm("a"); vm.GetQueue().GetStep() != state.StepEvicting || !vm.Queue.Cold || vm.Host != "me" {
		t.Fatalf("it cannot go live, and is %v", vm)
	}
	j.beat("me")
	if vm = j.vm("a"); vm.GetQueue().GetStep() != state.StepStarting || vm.Host != "other" || j.machines["me"] != "" {
		t.Fatalf("it goes cold: %v, machines %v", vm, j.machines)
	}
	k := j.procs["me"].k
	if err := k.Land(context.Background(), vm); !errors.Is(err, status.Conflict) {
		t.Errorf("landed without metadata's word: %v", err)
	}
}
