package server

import (
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// fleetState is hosts h1…h4 and a VM on each of those named.
func fleetState(t *testing.T, on ...string) state.KV {
	kv, _ := fleetDoes(t, on...)
	return kv
}

func fleetDoes(t *testing.T, on ...string) (kv state.KV, do func(*pb.Command) *pb.Result) {
	kv = state.NewMem()
	seq := uint64(0)
	do = func(cmd *pb.Command) *pb.Result {
		t.Helper()
		seq++
		cmd.Session, cmd.Seq = "s", seq
		res := state.Apply(kv, cmd)
		if res.Status != 0 {
			t.Fatal(res.Detail)
		}
		return res
	}
	state.Apply(kv, &pb.Command{Session: "s", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	for _, h := range []string{"h1", "h2", "h3", "h4"} {
		do(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: h, Cpus: 4, MemoryBytes: 1 << 30}}}})
	}
	for _, h := range on {
		vm := do(&pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: "vm-" + h, Cpus: 1, MemoryBytes: 1 << 20, Desired: "stopped"}}}}).Vm
		do(&pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: h, Desired: "running"}}})
	}
	return kv, do
}

// switchedVM is a VM on its way from h1 to h2, after its volume went.
func switchedVM(t *testing.T) state.KV {
	kv, do := fleetDoes(t, "h1")
	for i, h := range []string{"h1", "h2", "h3"} {
		id := make([]byte, 16)
		id[0] = byte(i + 1)
		do(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: id, Incarnation: 1, Host: h, CapacityBytes: 1 << 40}}}})
	}
	do(&pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: "v", SizeBytes: 1 << 30, Replicas: 3}}})
	v := do(&pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: "v", Host: "h1", Session: "s1"}}}).Volume
	bind := &pb.BindVM{Vm: "vm-h1", Revision: state.VMByName(kv, "vm-h1").Revision, Host: "h1", Desired: "running", Queue: &pb.VMQueue{Step: state.StepMigrating, NextHost: "h2"}}
	vm := do(&pb.Command{Op: &pb.Command_BindVm{BindVm: bind}}).Vm
	bind = &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: "h2", Desired: "running", Queue: &pb.VMQueue{Step: state.StepSwitched, NextHost: "h1"}}
	do(&pb.Command{Op: &pb.Command_HandOver{HandOver: &pb.HandOver{VolumeId: v.Id, Epoch: v.Epoch, Host: "h2", Session: "s2", Bind: bind}}})
	return kv
}

// Of a VM that is switched both hosts hear, and neither is told to end its
// machine. If the one it comes from is gone, it lands; if the other is, that one
// decides until it is gone for good.
func TestASwitchedVMAndItsHosts(t *testing.T) {
	kv := switchedVM(t)
	for _, h := range []string{"h1", "h2"} {
		if got, _ := vmsToDo(kv, h); len(got) != 1 {
			t.Errorf("%s hears of %v", h, got)
		}
		if got := notHere(kv, h, []string{"vm-h1"}); len(got) != 0 {
			t.Errorf("%s is to end %v", h, got)
		}
	}
	if got := notHere(kv, "h3", []string{"vm-h1"}); len(got) != 1 {
		t.Error("a third host keeps a machine of it")
	}
	now := 10 * defaultRestart
	tn := &tenure{since: 0, hosts: map[string]*beat{"h2": {at: now}, "h3": {at: now}, "h4": {at: now}}}
	got, said := tn.lost(kv, now)
	if len(got) != 1 || got[0].Host != "h2" || got[0].Queue.Step != state.StepLanded || got[0].Queue.NextHost != "h1" || said != "" {
		t.Errorf("its old host is gone: %v, %q", got, said)
	}
	tn.hosts["h1"], tn.hosts["h2"] = &beat{at: now}, &beat{at: 0}
	if got, _ := tn.lost(kv, now); len(got) != 1 || got[0].Queue.Step != state.StepQueued {
		t.Errorf("its new host is gone: %v", got)
	}
}

// VMs of a host that is silent for the grace time go into the queue; not sooner,
// not right after an election, and not when most hosts are silent.
func TestVMsOfASilentHostAreQueued(t *testing.T) {
	kv := fleetState(t, "h1", "h2", "h3")
	tn := &tenure{since: 0, hosts: map[string]*beat{}}
	if got, _ := tn.lost(kv, defaultRestart-1); len(got) != 0 {
		t.Fatalf("a new leader that has heard nobody yet sends away %v", got)
	}
	now := 10 * defaultRestart
	for _, h := range []string{"h2", "h3", "h4"} {
		tn.hosts[h] = &beat{at: now}
	}
	tn.hosts["h1"] = &beat{at: now - defaultRestart + time.Second}
	if got, _ := tn.lost(kv, now); len(got) != 0 {
		t.Fatalf("before the grace is over: %v", got)
	}
	tn.hosts["h1"].at -= time.Second
	got, said := tn.lost(kv, now)
	if len(got) != 1 || got[0].Vm != "vm-h1" || got[0].Host != "" || got[0].Queue.Step != state.StepQueued || !strings.Contains(got[0].Queue.Reason, "host h1") || said != "" {
		t.Fatalf("got %v, said %q", got, said)
	}
	tn.hosts["h2"].at, tn.hosts["h3"].at = 0, 0
	if got, said := tn.lost(kv, now); len(got) != 0 || !strings.Contains(said, "3 of 4 hosts") {
		t.Fatalf("three of four hosts are silent: %v, said %q", got, said)
	}
}

// A host's machine that metadata has on another host is named; one that metadata
// does not know is not.
func TestMachinesThatAreElsewhere(t *testing.T) {
	kv := fleetState(t, "h1", "h2")
	if got := notHere(kv, "h1", []string{"vm-h1", "vm-h2", "unknown"}); len(got) != 1 || got[0] != "vm-h2" {
		t.Errorf("not here: %v", got)
	}
}
