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

// kvVolume is a volume of that name, attached on a host.
func (c *cluster) kvVolume(name, host string) *pb.Volume {
	if VolumeByName(c.kv, name) == nil {
		for i := range 3 {
			h := fmt.Sprintf("h%d", i)
			c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(byte(i)), Incarnation: 1, Host: h, CapacityBytes: 1 << 40}}}})
		}
		c.ok(create(name))
	}
	return c.ok(attach(name, host, true)).Volume
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
		for _, host := range []string{vm.Host, SecondHost(vm)} {
			u := used[host]
			for i, n := range Takes(vm) {
				u[i] += n
			}
			used[host] = u
		}
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
					Queue: &pb.VMQueue{Step: rapid.SampledFrom([]string{"", "", StepQueued, StepStarting, StepEvicting, StepMigrating, StepMigrating, StepLanded, StepReturning}).Draw(rt, "step"),
						NextHost: rapid.SampledFrom([]string{"", "h0", "h1", "h2", "h3"}).Draw(rt, "next"), Sliced: rapid.Bool().Draw(rt, "sliced")}}
				if now := VMByName(c.kv, vm.Name); now.GetQueue().GetStep() == StepMigrating && rapid.Bool().Draw(rt, "switch") {
					v := c.kvVolume(vm.Name, now.Host)
					b = &pb.BindVM{Vm: vm.Name, Revision: now.Revision, Host: now.Queue.NextHost, Desired: "running", Queue: &pb.VMQueue{Step: StepSwitched, NextHost: now.Host}}
					res = c.do(&pb.Command{Op: &pb.Command_HandOver{HandOver: &pb.HandOver{VolumeId: v.Id, Epoch: v.Epoch, Host: b.Host, Session: "s", Bind: b}}})
				} else {
					res = c.do(bindVM(b))
				}
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
				if vm.Desired != "stopped" && HasMachine(vm, h.Name) {
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
	wantKind(t, set(&pb.Placement{CoolMs: -2}), status.Invalid, "30 days")
	wantKind(t, set(&pb.Placement{CoolPercent: 100}), status.Invalid, "99 %")
	wantKind(t, set(&pb.Placement{Policy: "min", Order: "sjf", Weights: map[string]float64{"a": 2}}), status.OK, "")
	if p := PlacementOf(c.kv); p.Policy != "min" || p.Weights["a"] != 2 {
		t.Errorf("kept %v", p)
	}
}

// migrating is VM a on h0, migrating to h1, with its two volumes.
func migrating(t *testing.T) (c *cluster, vm *pb.VM, over *pb.HandOver) {
	c = newYard(t, 3)
	vm = c.vmOf("a", 1, nil)
	c.to("a", "h0")
	v, w := c.kvVolume("a", "h0"), c.kvVolume("b", "h0")
	vm = c.ok(bindVM(&pb.BindVM{Vm: "a", Revision: vm.Revision + 1, Host: "h0", Desired: "running", Queue: &pb.VMQueue{Step: StepMigrating, NextHost: "h1"}})).Vm
	return c, vm, &pb.HandOver{VolumeId: v.Id, Epoch: v.Epoch, Host: "h1", Session: "s1",
		Also: []*pb.HandOver{{VolumeId: w.Id, Epoch: w.Epoch}},
		Bind: &pb.BindVM{Vm: "a", Revision: vm.Revision, Host: "h1", Desired: "running", Queue: &pb.VMQueue{Step: StepSwitched, NextHost: "h0"}}}
}

func handOver(op *pb.HandOver) *pb.Command {
	return &pb.Command{Op: &pb.Command_HandOver{HandOver: op}}
}

// The volumes of a VM and the VM itself change hands together or not at all.
func TestAVMSwitchesWithAllItsVolumes(t *testing.T) {
	for what, change := range map[string]func(c *cluster, op *pb.HandOver){
		"a volume of another epoch":  func(_ *cluster, op *pb.HandOver) { op.Also[0].Epoch-- },
		"a volume twice":             func(_ *cluster, op *pb.HandOver) { op.Also[0] = &pb.HandOver{VolumeId: op.VolumeId, Epoch: op.Epoch} },
		"a VM that was changed":      func(_ *cluster, op *pb.HandOver) { op.Bind.Revision-- },
		"a VM that goes elsewhere":   func(_ *cluster, op *pb.HandOver) { op.Bind.Host = "h2" },
		"a VM that is settled after": func(_ *cluster, op *pb.HandOver) { op.Bind.Queue = nil },
		"a VM that no longer moves": func(c *cluster, op *pb.HandOver) {
			op.Bind.Revision = c.ok(bindVM(&pb.BindVM{Vm: "a", Revision: op.Bind.Revision, Host: "h0", Desired: "running"})).Vm.Revision
		},
	} {
		c, _, op := migrating(t)
		change(c, op)
		res := c.do(handOver(op))
		if k := status.Kind(res.Status); k == status.OK {
			t.Errorf("%s: handed over", what)
		}
		for _, name := range []string{"a", "b"} {
			if v := VolumeByName(c.kv, name); v.HolderHost != "h0" || v.Epoch != 1 {
				t.Errorf("%s: volume %s moved alone: %v", what, name, v)
			}
		}
		if vm := VMByName(c.kv, "a"); vm.Host != "h0" {
			t.Errorf("%s: the VM moved alone: %v", what, vm)
		}
	}
	c, _, op := migrating(t)
	res := c.ok(handOver(op))
	if len(res.Volumes) != 2 || res.Vm.Host != "h1" || res.Vm.Queue.Step != StepSwitched {
		t.Fatalf("switched: %v", res)
	}
	for _, name := range []string{"a", "b"} {
		if v := VolumeByName(c.kv, name); v.HolderHost != "h1" || v.HolderSession != "s1" || v.Moved {
			t.Errorf("volume %s is %v", name, v)
		}
	}
	if res := c.do(handOver(op)); status.Kind(res.Status) != status.Fenced {
		t.Errorf("switched twice: %v", res)
	}
}

// From switched a VM lands or returns, one of the two, and runs nowhere before:
// neither host can make itself the one that runs it.
func TestASwitchedVMLandsOrReturns(t *testing.T) {
	to := func(vm *pb.VM, host, step, next string) *pb.Command {
		return bindVM(&pb.BindVM{Vm: "a", Revision: vm.Revision, Host: host, Desired: "running", Queue: &pb.VMQueue{Step: step, NextHost: next}})
	}
	c, before, op := migrating(t)
	for _, cmd := range []*pb.Command{to(before, "h1", StepSwitched, "h0"), to(before, "h1", StepLanded, "h0"), to(before, "h0", StepReturning, "h1")} {
		wantKind(t, c.do(cmd), status.Conflict, "it moves")
	}
	vm := c.ok(handOver(op)).Vm
	for _, cmd := range []*pb.Command{to(vm, "h1", "", ""), to(vm, "h0", "", ""), to(vm, "h1", StepStarting, ""), to(vm, "h0", StepLanded, "h1"),
		to(vm, "h1", StepReturning, "h0"), to(vm, "h2", StepReturning, "h1"), to(vm, "h1", StepMigrating, "h2")} {
		wantKind(t, c.do(cmd), status.Conflict, "it moves")
	}
	c.ok(&pb.Command{Op: &pb.Command_SetHost{SetHost: &pb.SetHost{Host: "h0", Drained: true}}}) // its own room is kept all the same
	landed, returned := to(vm, "h1", StepLanded, "h0"), to(vm, "h0", StepReturning, "h1")
	c.ok(returned)
	wantKind(t, c.do(landed), status.Conflict, "was changed")
	if vm := VMByName(c.kv, "a"); HasMachine(vm, "h1") || !HasMachine(vm, "h0") {
		t.Errorf("returning, and its machines may be elsewhere: %v", vm)
	}

	c, _, op = migrating(t)
	vm = c.ok(handOver(op)).Vm
	landed, returned = to(vm, "h1", StepLanded, "h0"), to(vm, "h0", StepReturning, "h1")
	vm = c.ok(landed).Vm
	wantKind(t, c.do(returned), status.Conflict, "was changed")
	if HasMachine(vm, "h0") {
		t.Errorf("landed, and its old host may have a machine: %v", vm)
	}
	c.ok(to(vm, "h1", "", ""))
}

// A host keeps room for a VM that comes, and for one that may return.
func TestRoomIsKeptOnBothHosts(t *testing.T) {
	c, _, op := migrating(t)
	c.vmOf("big", 6, nil) // as much as a host may promise
	wantKind(t, c.to("big", "h1"), status.NoSpace, "host h1")
	c.ok(handOver(op))
	wantKind(t, c.to("big", "h0"), status.NoSpace, "host h0")
	vm := VMByName(c.kv, "a")
	c.ok(bindVM(&pb.BindVM{Vm: "a", Revision: vm.Revision, Host: "h1", Desired: "running", Queue: &pb.VMQueue{Step: StepLanded, NextHost: "h0"}}))
	if res := c.to("big", "h0"); res.Status != 0 {
		t.Errorf("it has left, and there is no room: %v", res)
	}
}

// looking counts the pairs that scans have come by.
type looking struct {
	*Mem
	pairs int
}

func (l *looking) Scan(prefix, from []byte, fn func(key, val []byte) bool) {
	l.Mem.Scan(prefix, from, func(k, v []byte) bool { l.pairs++; return fn(k, v) })
}

// A volume is created after a look at a few stores, however many there are; one that
// would need more of them than that gets its answer from all.
func TestACreationLooksAtFewStores(t *testing.T) {
	c := newCluster(t)
	const hosts = 200
	for i := 3; i < hosts; i++ {
		name := fmt.Sprintf("host-%d", i+1)
		c.ok(register(name, ""))
		c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(byte(i)), Incarnation: 1, Host: name, CapacityBytes: 1 << 40}}}})
	}
	for _, x := range []struct {
		size  uint64
		kind  status.Kind
		looks int
	}{{1 << 30, status.OK, 3}, {20 << 40, status.OK, 60}, {hosts / 3 << 40, status.OK, hosts}, {hosts << 40, status.NoSpace, hosts}} {
		l := &looking{Mem: c.kv}
		c.seq++
		res := Apply(l, &pb.Command{Session: "s", Seq: c.seq, Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: fmt.Sprintf("v%d", c.seq), SizeBytes: x.size, Replicas: 3}}})
		if status.Kind(res.Status) != x.kind || l.pairs > x.looks+1 { // one scan is for what is forgotten
			t.Errorf("%d TiB: %v %s after a look at %d pairs, at most %d and one", x.size>>40, status.Kind(res.Status), res.Detail, l.pairs, x.looks)
		}
	}
}

// Beside thick volumes the space of all stores counts for each chunk, and is known
// without a look at them, also when the version rises while they are there.
func TestAnAllocationBesideThickVolumesLooksAtNoStore(t *testing.T) {
	c := newCluster(t)
	const hosts = 100
	store := func(i int, bytes uint64) *pb.Command {
		return &pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(byte(i)), Incarnation: 1, Host: fmt.Sprintf("host-%d", i+1), CapacityBytes: bytes}}}}
	}
	retire := func(i int, yes bool) *pb.Command {
		return &pb.Command{Op: &pb.Command_RetireStore{RetireStore: &pb.RetireStore{Store: storeID(byte(i)), Retired: yes}}}
	}
	for i := 3; i < hosts; i++ {
		c.ok(register(fmt.Sprintf("host-%d", i+1), ""))
		c.ok(store(i, 1<<40))
	}
	c.ok(retire(50, true))
	thick := create("thick")
	thick.GetCreateVolume().Thick = true
	c.ok(thick)
	c.ok(create("v"))
	v := c.ok(attach("v", "host-1", false)).Volume
	looks := func(index uint32) int {
		l := &looking{Mem: c.kv}
		c.seq++
		cmd := allocate(v, v.Epoch, index)
		cmd.Session, cmd.Seq = "s", c.seq
		res := Apply(l, cmd)
		if res.Status != 0 {
			t.Fatal(res.Detail)
		}
		v = res.Volume
		return l.pairs
	}
	if n := looks(0); n < hosts {
		t.Fatalf("before version 5 an allocation looked at %d pairs: what follows shows nothing", n)
	}
	c.raise(Format)
	for index, change := range []*pb.Command{nil, retire(50, false), retire(51, true), store(52, 3<<40), store(51, 2<<40), {Op: &pb.Command_RemoveStore{RemoveStore: &pb.RemoveStore{Store: storeID(51)}}}, {Op: &pb.Command_RemoveHost{RemoveHost: &pb.RemoveHost{Host: "host-70"}}}} {
		if change != nil {
			c.ok(change)
		}
		c.audit()
		if n := looks(uint32(index) + 1); n > 20 {
			t.Errorf("an allocation looked at %d pairs", n)
		}
	}
	if got := StoreBytes(c.kv); got != (hosts-2+2)<<40 {
		t.Errorf("%d TiB: one store of 100 is gone, one host, and one has grown by 2", got>>40)
	}
}
