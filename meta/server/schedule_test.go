package server

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A VM that waits is bound by the leader, whoever leads, and its host hears of
// it in the answer to a heartbeat until it says that it has started it.
func TestQueueRunsOnTheLeader(t *testing.T) {
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	for i := 1; i <= 3; i++ {
		hostUp(t, ctx, c, i)
	}
	queue := func(name string) {
		t.Helper()
		vm := must(t, ctx, c, &pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: name, Cpus: 1, MemoryBytes: 1 << 20, Desired: "stopped"}}}}).Vm
		must(t, ctx, c, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: name, Revision: vm.Revision, Desired: "running", Queue: &pb.VMQueue{Step: state.StepQueued}}}})
	}
	bound := func(name string) (vm *pb.VM) {
		t.Helper()
		until(t, func() string {
			rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
			if err != nil {
				return err.Error()
			}
			if vm = rep.Vms[0]; vm.GetQueue().GetStep() != state.StepStarting {
				return fmt.Sprintf("VM %s is in step %q", name, vm.GetQueue().GetStep())
			}
			return ""
		})
		return vm
	}
	hears := func() []*pb.VM {
		t.Helper()
		rep, err := c.Renew(ctx, &pb.RenewRequest{Host: "host-1", Session: "gw-1"})
		if err != nil {
			t.Fatal(err)
		}
		return rep.Vms
	}
	queue("a")
	a := bound("a")
	if got := hears(); a.Host != "host-1" || len(got) != 1 || got[0].Name != "a" {
		t.Fatalf("VM a is on %q and its host hears %v", a.Host, got)
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: "a", Revision: a.Revision, Host: "host-1", Desired: "running"}}})
	if got := hears(); len(got) != 0 {
		t.Errorf("the host still hears %v", got)
	}
	tr.stop(tr.leader())
	queue("b")
	bound("b")
}

// Heat is kept for volumes the reporting host holds, and for no others.
func TestHeatIsOfHeldVolumes(t *testing.T) {
	tn := &tenure{}
	report := []*pb.VolumeHeat{{VolumeId: 1, Chunks: []*pb.ChunkHeat{{Index: 3, Read: 100}}}, {VolumeId: 2, Chunks: []*pb.ChunkHeat{{Index: 3, Read: 100}}}}
	tn.hearHeat(report, map[uint64]bool{1: true}, 0)
	if got := tn.heatOf(1, heatHalfLife); got[3].GetRead() != 50 {
		t.Errorf("after a half-life %v", got)
	}
	if got := tn.heatOf(2, 0); got != nil {
		t.Errorf("a volume the host does not hold is hot: %v", got)
	}
	tn.hearHeat(nil, nil, 2*heatKeep)
	if got := tn.heatOf(1, 2*heatKeep); got != nil {
		t.Errorf("forgotten heat is back: %v", got)
	}
}

// What a leader has not heard of was used when it began; reports, and allocations,
// say what was used since; of an attached volume without a fresh report nothing is
// known.
func TestIdleIsSinceTheLastUse(t *testing.T) {
	tn := &tenure{since: 100 * time.Second}
	idle := func(home string, now time.Duration) (out []int64) {
		v := VolumeView{ID: 1, Home: home, Chunks: []ChunkView{{Index: 0}, {Index: 9}, {Index: 17}}}
		tn.warmth(&v, now)
		for _, c := range v.Chunks {
			out = append(out, int64(math.Floor(float64(c.IdleMs)/1000)))
		}
		return out
	}
	hear := func(now time.Duration, r *pb.VolumeHeat) {
		r.VolumeId = 1
		tn.hearHeat([]*pb.VolumeHeat{r}, map[uint64]bool{1: true}, now)
	}
	check := func(what string, got []int64, want ...int64) {
		t.Helper()
		for i := range want { // a use counts from the end of its second
			if got[i] != want[i] && got[i] != want[i]-1 {
				t.Errorf("%s: idle for %v s, want %v", what, got, want)
				return
			}
		}
	}
	check("nothing heard, not attached", idle("", 160*time.Second), 60, 60, 60)
	check("nothing heard, attached", idle("host-1", 160*time.Second), -1, -1, -1)
	hear(200*time.Second, &pb.VolumeHeat{Said: true, Used: []byte{1, 2}})
	check("heard", idle("host-1", 210*time.Second), 10, 10, 110)
	hear(220*time.Second, &pb.VolumeHeat{Said: true})
	tn.use(1, []uint32{17, 1 << 31}, 225*time.Second)
	check("allocated", idle("host-1", 230*time.Second), 30, 30, 5)
	check("silent", idle("host-1", 260*time.Second), -1, -1, -1)
	check("detached", idle("", 260*time.Second), 60, 60, 35)
	hear(300*time.Second, &pb.VolumeHeat{})
	check("not said", idle("host-1", 310*time.Second), 10, 10, 10)
	hear(320*time.Second, &pb.VolumeHeat{Said: true, Used: make([]byte, useBytes+1)})
	check("more than a report may say", idle("", 330*time.Second), 10, 10, 10)
}

// What nobody has attached has no heat to be brought back for.
func TestADetachedVolumeHasNoHeat(t *testing.T) {
	tn := &tenure{}
	tn.hearHeat([]*pb.VolumeHeat{{VolumeId: 1, Said: true, Chunks: []*pb.ChunkHeat{{Index: 3, Read: 100}}}}, map[uint64]bool{1: true}, 0)
	for home, want := range map[string]float64{"host-1": 100, "": 0} {
		v := VolumeView{ID: 1, Home: home, Chunks: []ChunkView{{Index: 3}}}
		if tn.warmth(&v, 0); v.Chunks[0].Read != want {
			t.Errorf("attached on %q: %.0f bytes read, want %.0f", home, v.Chunks[0].Read, want)
		}
	}
}

// A policy nobody knows is refused before the log.
func TestUnknownPolicyIsRefused(t *testing.T) {
	tr := newTrio(t, nil)
	_, err := tr.client().Do(tr.ctx(), &pb.Command{Op: &pb.Command_SetPlacement{SetPlacement: &pb.SetPlacement{Placement: &pb.Placement{Policy: "nonsense"}}}})
	if status.Of(err) != status.Invalid {
		t.Errorf("got %v", err)
	}
}
