package state

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// yard is a state with hosts of 4 processors, 8 GiB and 150 % of their
// processors to promise.
func newYard(t *testing.T, hosts int) *cluster {
	c := &cluster{t: t, kv: NewMem()}
	c.raw(&pb.Command{Session: "s", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	for i := range hosts {
		c.ok(registerHost(&pb.Host{Name: fmt.Sprintf("h%d", i), Cpus: 4, MemoryBytes: 8 << 30,
			Labels: map[string]string{"rack": fmt.Sprintf("r%d", i/2)}, Promise: &pb.HostPromise{CpuPercent: 150, Networks: []string{"red"}}}))
	}
	return c
}

func registerHost(h *pb.Host) *pb.Command {
	return &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: h}}}
}

func putVM(vm *pb.VM, create bool) *pb.Command {
	return &pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Vm: vm, Create: create}}}
}

func bindVM(b *pb.BindVM) *pb.Command { return &pb.Command{Op: &pb.Command_BindVm{BindVm: b}} }

func (c *cluster) vmOf(name string, cpus uint32, n *pb.VMNeeds) *pb.VM {
	c.t.Helper()
	return c.ok(putVM(&pb.VM{Name: name, Cpus: cpus, MemoryBytes: 1 << 30, Desired: "stopped", Needs: n}, true)).Vm
}

// to binds a VM as it is now to a host.
func (c *cluster) to(name, host string) *pb.Result {
	return c.do(bindVM(&pb.BindVM{Vm: name, Revision: VMByName(c.kv, name).Revision, Host: host, Desired: "running"}))
}

func wantKind(t *testing.T, res *pb.Result, k status.Kind, words string) {
	t.Helper()
	if status.Kind(res.Status) != k || !strings.Contains(res.Detail, words) {
		t.Errorf("got %v %q, want %v with %q", status.Kind(res.Status), res.Detail, k, words)
	}
}

// overcommitted says what is promised twice, by a sum over all VMs that uses no
// index; "" when nothing is.
func overcommitted(kv KV) string {
	used := map[string]Resources{}
	for _, vm := range VMs(kv) {
		u := used[vm.Host]
		for i, n := range Takes(vm) {
			u[i] += n
		}
		used[vm.Host] = u
	}
	for _, h := range Hosts(kv) {
		for i, limit := range Limit(h) {
			if used[h.Name][i] > limit {
				return fmt.Sprintf("host %s promised %d of %d %s", h.Name, used[h.Name][i], limit, resourceNames[i])
			}
		}
	}
	return ""
}

// Schedulers with pictures of any age bind, resize, slice, queue and stop VMs:
// nothing is ever promised twice, and the indexes say what a scan says.
func TestNothingIsPromisedTwice(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		c := newYard(t, 4)
		var seen []*pb.VM // as some scheduler has read it, once
		for i := range 8 {
			seen = append(seen, c.vmOf(fmt.Sprintf("vm%d", i), uint32(1+i%4), &pb.VMNeeds{Batch: i%2 == 0, Group: "g"}))
		}
		for range rapid.IntRange(5, 60).Draw(rt, "steps") {
			vm := rapid.SampledFrom(seen).Draw(rt, "read")
			host := rapid.SampledFrom([]string{"", "h0", "h1", "h2", "h3"}).Draw(rt, "host")
			var res *pb.Result
			if rapid.IntRange(0, 4).Draw(rt, "op") == 0 {
				now := VMByName(c.kv, vm.Name)
				now.Cpus, now.MemoryBytes = uint32(rapid.IntRange(1, 6).Draw(rt, "cpus")), uint64(rapid.IntRange(1, 9).Draw(rt, "memory"))<<30
				res = c.do(putVM(now, false))
			} else {
				b := &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: host, Desired: rapid.SampledFrom([]string{"running", "running", "stopped", "paused"}).Draw(rt, "desired"),
					Queue: &pb.VMQueue{Step: rapid.SampledFrom([]string{"", "", StepQueued, StepStarting, StepEvicting}).Draw(rt, "step"), Sliced: rapid.Bool().Draw(rt, "sliced")}}
				res = c.do(bindVM(b))
			}
			if res.Vm != nil {
				seen = append(seen, res.Vm)
			}
			if why := overcommitted(c.kv); why != "" {
				rt.Fatal(why)
			}
		}
		for _, h := range Hosts(c.kv) {
			n := 0
			for _, vm := range VMs(c.kv) {
				if vm.Host == h.Name && vm.Desired != "stopped" {
					n++
				}
			}
			if got := VMsOn(c.kv, h.Name); len(got) != n {
				rt.Fatalf("the index has %d VMs on %s, a scan %d", len(got), h.Name, n)
			}
		}
		for _, vm := range VMs(c.kv) {
			if vm.Host != "" || vm.Desired != "stopped" {
				c.ok(bindVM(&pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Desired: "stopped"}))
			}
			c.ok(&pb.Command{Op: &pb.Command_DeleteVm{DeleteVm: &pb.DeleteVM{Name: vm.Name}}})
		}
		for _, table := range []byte{tOnHost, tInGroup, tUnderway} {
			c.kv.Scan(key(table), nil, func(k, _ []byte) bool { rt.Fatalf("%q is left in an index", k); return false })
		}
	})
}

func TestBindIsCompareAndSet(t *testing.T) {
	c := newYard(t, 2)
	vm := c.vmOf("a", 1, nil)
	b := &pb.BindVM{Vm: "a", Revision: vm.Revision, Host: "h0", Desired: "running"}
	c.ok(bindVM(b))
	again := &pb.BindVM{Vm: "a", Revision: vm.Revision, Host: "h1", Desired: "running"}
	wantKind(t, c.do(bindVM(again)), status.Conflict, "changed meanwhile")
	if got := VMByName(c.kv, "a"); got.Host != "h0" {
		t.Errorf("it is on %q", got.Host)
	}
}

func TestBindRefusesWhatDoesNotFit(t *testing.T) {
	c := newYard(t, 4)
	c.vmOf("big", 7, nil)
	wantKind(t, c.to("big", "h0"), status.NoSpace, "6000 of 6000 thousandths")
	c.vmOf("six", 6, nil) // 4 processors at 150 %
	wantKind(t, c.to("six", "h0"), status.OK, "")
	c.vmOf("one", 1, nil)
	wantKind(t, c.to("one", "h0"), status.NoSpace, "0 of 6000")
	wantKind(t, c.to("one", "nowhere"), status.NotFound, "no host")
	six := VMByName(c.kv, "six")
	six.Cpus = 1
	c.ok(putVM(six, false)) // smaller always works
	wantKind(t, c.to("one", "h0"), status.OK, "")
	six = VMByName(c.kv, "six")
	six.Cpus = 6
	wantKind(t, c.do(putVM(six, false)), status.NoSpace, "host h0")

	c.vmOf("picky", 1, &pb.VMNeeds{Labels: map[string]string{"rack": "r1"}})
	wantKind(t, c.to("picky", "h1"), status.Conflict, `rack="r0"`)
	wantKind(t, c.to("picky", "h2"), status.OK, "")
	c.vmOf("blue", 1, &pb.VMNeeds{Networks: []string{"blue"}})
	wantKind(t, c.to("blue", "h1"), status.Conflict, "network blue")
	h := HostByName(c.kv, "h3")
	h.Drained = true
	put(c.kv, key(tHost, "h3"), h)
	c.vmOf("late", 1, nil)
	wantKind(t, c.to("late", "h3"), status.Conflict, "drained")
}

func TestGroupsKeepApartAndNear(t *testing.T) {
	c := newYard(t, 4)
	apart := &pb.VMNeeds{Group: "db", Apart: "db", Domain: "rack"}
	for _, n := range []string{"a", "b", "c"} {
		c.vmOf(n, 1, apart)
	}
	c.vmOf("app", 1, &pb.VMNeeds{Near: "db", Domain: "rack"})
	wantKind(t, c.to("a", "h0"), status.OK, "")
	wantKind(t, c.to("b", "h1"), status.Conflict, "apart")
	wantKind(t, c.to("app", "h2"), status.Conflict, "near")
	wantKind(t, c.to("b", "h2"), status.OK, "")
	wantKind(t, c.to("c", "h3"), status.Conflict, "apart")
	wantKind(t, c.to("app", "h3"), status.OK, "")
	c.ok(bindVM(&pb.BindVM{Vm: "b", Revision: VMByName(c.kv, "b").Revision, Desired: "stopped"}))
	wantKind(t, c.to("c", "h3"), status.OK, "") // the one before has left
}

func TestSlicedVMsTakeNoProcessors(t *testing.T) {
	c := newYard(t, 1)
	for _, n := range []string{"a", "b"} {
		c.vmOf(n, 6, &pb.VMNeeds{Batch: true})
	}
	c.vmOf("service", 1, nil)
	sliced := func(name string, s bool) *pb.Result {
		return c.do(bindVM(&pb.BindVM{Vm: name, Revision: VMByName(c.kv, name).Revision, Host: "h0", Desired: "running", Queue: &pb.VMQueue{Sliced: s}}))
	}
	wantKind(t, c.to("a", "h0"), status.OK, "")
	wantKind(t, sliced("b", true), status.OK, "")
	wantKind(t, sliced("b", false), status.NoSpace, "host h0")
	wantKind(t, sliced("a", true), status.OK, "")
	wantKind(t, sliced("b", false), status.OK, "")
	wantKind(t, sliced("service", true), status.Invalid, "sliced")
	if got := len(VMsUnderway(c.kv)); got != 1 {
		t.Errorf("%d VMs are under way, want the sliced one", got)
	}
}

func TestPlacementPolicyIsChecked(t *testing.T) {
	c := newYard(t, 1)
	set := func(p *pb.Placement) *pb.Result {
		return c.do(&pb.Command{Op: &pb.Command_SetPlacement{SetPlacement: &pb.SetPlacement{Placement: p}}})
	}
	wantKind(t, set(&pb.Placement{Weights: map[string]float64{"a": 0}}), status.Invalid, "weight")
	wantKind(t, set(&pb.Placement{AgeMs: -1}), status.Invalid, "30 days")
	wantKind(t, set(&pb.Placement{Policy: "min", Order: "sjf", Weights: map[string]float64{"a": 2}}), status.OK, "")
	if p := PlacementOf(c.kv); p.Policy != "min" || p.Weights["a"] != 2 {
		t.Errorf("kept %v", p)
	}
}
