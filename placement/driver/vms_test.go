package driver

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const gib = 1 << 30

// cluster is hosts of 4 processors and 16 GiB.
func cluster(hosts int, vms ...*pb.VM) *server.Picture {
	p := &server.Picture{NowMs: 1_000_000, VMs: vms, Policy: &pb.Placement{}, Chunks: func(*pb.VM) []server.ChunkView { return nil }}
	for i := range hosts {
		p.Hosts = append(p.Hosts, server.HostView{Host: &pb.Host{Name: fmt.Sprintf("h%d", i), Cpus: 4, MemoryBytes: 16 * gib}, Up: true, FreeBytes: 100 * gib})
	}
	return p
}

func vm(name string, cpus uint32, host string) *pb.VM {
	v := &pb.VM{Name: name, Cpus: cpus, MemoryBytes: gib, Desired: "stopped", Host: host, Needs: &pb.VMNeeds{}, Revision: 7}
	if host != "" {
		v.Desired = "running"
	}
	return v
}

// queued is a VM that waits since so long before the picture.
func queued(name string, cpus uint32, waitedMs int64) *pb.VM {
	v := vm(name, cpus, "")
	v.Desired, v.Queue = "running", &pb.VMQueue{Step: state.StepQueued, SinceUnixNs: (1_000_000 - waitedMs) * 1e6}
	return v
}

// dataOn gives every VM its data on these hosts.
func dataOn(p *server.Picture, hosts ...string) {
	p.Chunks = func(*pb.VM) []server.ChunkView {
		return []server.ChunkView{{Hosts: hosts, Bytes: 64 << 20, Read: 100 * gib, Write: gib}}
	}
}

func binds(bs []*pb.BindVM) string {
	var out []string
	for _, b := range bs {
		s := b.Vm + "→" + b.Host + " " + b.GetQueue().GetStep()
		if b.GetQueue().GetSliced() {
			s += " sliced"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func TestVMGoesToItsData(t *testing.T) {
	p := cluster(4, vm("v", 1, ""))
	dataOn(p, "h2")
	host, reason, err := New().PlaceVM(p, "v")
	if err != nil || host != "h2" || !strings.Contains(reason, "100 % of its traffic") {
		t.Errorf("got %s, %q, %v", host, reason, err)
	}
	p.Policy.Policy = "max"
	p.VMs = append(p.VMs, vm("w", 1, "h0"), vm("x", 1, "h2"), vm("y", 1, "h3"))
	if host, _, err = New().PlaceVM(p, "v"); err != nil || host != "h1" {
		t.Errorf("max: got %s, %v", host, err)
	}
	if _, _, err = New().PlaceVM(p, "nope"); !errors.Is(err, status.NotFound) {
		t.Errorf("got %v", err)
	}
	p.Hosts = nil
	if _, _, err = New().PlaceVM(p, "v"); !errors.Is(err, status.NoSpace) {
		t.Errorf("got %v", err)
	}
}

// A host that is down and would fit makes it a matter of time.
func TestDownHostIsToldApart(t *testing.T) {
	p := cluster(2, vm("v", 4, ""), vm("w", 1, "h0"))
	p.Hosts[1].Up = false
	if _, _, err := New().PlaceVM(p, "v"); !errors.Is(err, status.Unavailable) || !strings.Contains(err.Error(), "h1") {
		t.Errorf("got %v", err)
	}
}

// Over-commitment is the host's: 4 processors at 200 % take 8.
func TestOvercommitRatio(t *testing.T) {
	p := cluster(1, vm("v", 4, ""), vm("w", 4, "h0"))
	if _, _, err := New().PlaceVM(p, "v"); err == nil {
		t.Error("a full host takes another")
	}
	p.Hosts[0].Promise = &pb.HostPromise{CpuPercent: 200}
	if host, _, err := New().PlaceVM(p, "v"); err != nil || host != "h0" {
		t.Errorf("got %s, %v", host, err)
	}
}

// Delay scheduling: a short wait for the host with the data, then the next best.
func TestQueueWaitsForItsDataAWhile(t *testing.T) {
	p := cluster(2, queued("v", 2, 1000), vm("w", 3, "h0"))
	dataOn(p, "h0")
	if got := binds(New().Turn(p)); got != "" {
		t.Errorf("after one second: %s", got)
	}
	p.VMs[0] = queued("v", 2, 5000)
	if got := binds(New().Turn(p)); got != "v→h1 starting" {
		t.Errorf("after five seconds: %q", got)
	}
	p.VMs[0], p.VMs[1] = queued("v", 2, 1000), vm("w", 1, "h0")
	if got := binds(New().Turn(p)); got != "v→h0 starting" {
		t.Errorf("with room at home: %q", got)
	}
	if _, _, err := New().PlaceVM(cluster(1), "v"); !errors.Is(err, status.NotFound) {
		t.Error(err)
	}
}

func TestQueueOrderIsThePolicys(t *testing.T) {
	long, short := queued("long", 4, 300), queued("short", 4, 200)
	long.Needs.DurationMs, short.Needs.DurationMs = 1000, 10
	high := queued("high", 4, 100)
	high.Needs.Priority = 5
	p := cluster(1, long, short, high)
	for order, want := range map[string]string{"": "long", "sjf": "short", "priority": "high"} {
		p.Policy = &pb.Placement{Order: order}
		if got := New().Turn(p); len(got) != 1 || got[0].Vm != want || got[0].Revision != 7 {
			t.Errorf("%q: %s, want %s", order, binds(got), want)
		}
	}
	p.Policy = &pb.Placement{Order: "sjf", AgeMs: 250}
	if got := New().Turn(p); len(got) != 1 || got[0].Vm != "long" {
		t.Errorf("the aged one does not go first: %s", binds(got))
	}
	// Weights 3 and 1, and red has two of its processors already: 2/3 < 1/1.
	red, blue := queued("red", 1, 100), queued("blue", 1, 200)
	red.Needs.Tenant, blue.Needs.Tenant = "red", "blue"
	has1, has2 := vm("r", 2, "h0"), vm("b", 1, "h0")
	has1.Needs.Tenant, has2.Needs.Tenant = "red", "blue"
	p = cluster(1, red, blue, has1, has2)
	p.Policy = &pb.Placement{Order: "round-robin", Weights: map[string]float64{"red": 3}}
	if got := New().Turn(p); len(got) != 1 || got[0].Vm != "red" {
		t.Errorf("round-robin: %s", binds(got))
	}
}

func TestPreemptionMakesRoomOnce(t *testing.T) {
	high := queued("high", 4, 100)
	high.Needs.Priority = 5
	low, equal := vm("low", 4, "h0"), vm("equal", 4, "h1")
	equal.Needs.Priority = 5
	p := cluster(2, high, low, equal)
	p.Policy.Order = "priority"
	got := New().Turn(p)
	if binds(got) != "low→h0 evicting" || !strings.Contains(got[0].Queue.Reason, "VM high (priority 5") {
		t.Fatalf("got %s", binds(got))
	}
	low.Queue = got[0].Queue
	if got := New().Turn(p); len(got) != 0 {
		t.Errorf("room is being made already: %s", binds(got))
	}
	low.Queue = nil
	low.Needs.Priority = 5
	if got := New().Turn(p); len(got) != 0 {
		t.Errorf("an equal gives way: %s", binds(got))
	}
}

// A batch VM that fits nowhere takes turns with others; a service never shares.
func TestBatchSharesProcessors(t *testing.T) {
	running, next := vm("a", 4, "h0"), queued("b", 4, 100)
	running.Needs.Batch, next.Needs.Batch = true, true
	p := cluster(1, running, next)
	if got := binds(New().Turn(p)); got != "b→h0 starting sliced" {
		t.Errorf("got %q", got)
	}
	next.Needs.Batch = false
	if got := binds(New().Turn(p)); got != "" {
		t.Errorf("a service shares: %q", got)
	}
	next.Needs.Batch, running.Needs.Batch = true, false
	if got := binds(New().Turn(p)); got != "" {
		t.Errorf("a service is made to share: %q", got)
	}
}

func TestExplainAndRebalanceShowPrices(t *testing.T) {
	p := cluster(3, vm("v", 1, "h0"))
	dataOn(p, "h1")
	ans, err := New().Answer(p, &pb.PlaceQuestion{Vm: "v"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"it is on host h0", "now: h1 would serve 100 %", "HOST", "STEP", "move VM", "chosen"} {
		if !strings.Contains(ans.Text, want) {
			t.Errorf("no %q in\n%s", want, ans.Text)
		}
	}
	sum := 0.0
	for _, t := range ans.Scores[0].GetTerms() {
		sum += t.Weight * t.Value
	}
	if s := ans.Scores[0]; len(ans.Scores) != 3 || s.Host != "h1" || s.Refused != "" || s.Sum != sum || ans.Host != "h1" || !strings.Contains(ans.Text, ans.Reason) {
		t.Errorf("the explanation taken apart: %v", ans)
	}
	chosen := 0
	for _, s := range ans.Steps {
		if s.Chosen {
			chosen++
			if s.Step != "move data" || s.Host != "h0" || s.OnceBytes == 0 || s.Impossible != "" {
				t.Errorf("the chosen step is %v", s)
			}
		}
	}
	if chosen != 1 || len(ans.Steps) != 4 {
		t.Errorf("the steps: %v", ans.Steps)
	}
	ans, err = New().Answer(p, &pb.PlaceQuestion{Rebalance: true})
	if err != nil || len(ans.Moves) != 1 || ans.Moves[0].To != "h1" || ans.Moves[0].MoveBytes >= ans.Moves[0].StayBytes {
		t.Fatalf("moves %v: %v", ans.GetMoves(), err)
	}
	dataOn(p, "h0")
	if ans, err = New().Answer(p, &pb.PlaceQuestion{Rebalance: true}); err != nil || len(ans.Moves) != 0 {
		t.Errorf("it moves again: %v, %v", ans.GetMoves(), err)
	}
	// Cold: the same gain is worth nothing.
	p.Chunks = func(*pb.VM) []server.ChunkView { return []server.ChunkView{{Hosts: []string{"h1"}, Bytes: 64 << 20}} }
	if ans, err = New().Answer(p, &pb.PlaceQuestion{Rebalance: true}); err != nil || len(ans.Moves) != 0 {
		t.Errorf("a cold VM moves: %v, %v", ans.GetMoves(), err)
	}
}

func TestPoliciesAreKnown(t *testing.T) {
	if err := New().CheckPolicy(&pb.Placement{Policy: "best"}); !errors.Is(err, status.Invalid) {
		t.Error(err)
	}
	if err := New().CheckPolicy(&pb.Placement{Order: "lifo"}); !errors.Is(err, status.Invalid) {
		t.Error(err)
	}
	if err := New().CheckPolicy(&pb.Placement{}); err != nil {
		t.Error(err)
	}
}

// VMs leave a drained host for others with room, a few at a time; one that fits
// nowhere stays, and its room is not given away.
func TestVMsLeaveADrainedHost(t *testing.T) {
	a, b, big := vm("a", 1, "h0"), vm("b", 1, "h0"), vm("big", 4, "h0")
	p := cluster(2, a, b, big, vm("there", 1, "h1"))
	p.Hosts[0].Drained = true
	if got := binds(New().Leave(p, []*pb.VM{big, a, b}, 9)); got != "a→h0 evicting, b→h0 evicting" {
		t.Errorf("got %s", got)
	}
	if got := New().Leave(p, []*pb.VM{big, a, b}, 1); len(got) != 1 || got[0].Queue.NextHost != "h1" || !strings.Contains(got[0].Queue.Reason, "h0 is drained") {
		t.Errorf("got %v", got)
	}
}
