package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func prepare(v *pb.Volume, current uint32) *pb.Command {
	return &pb.Command{Op: &pb.Command_PrepareSnapshot{PrepareSnapshot: &pb.PrepareSnapshot{VolumeId: v.Id, Epoch: v.Epoch, Current: current}}}
}

func nameCuts(name string, cuts ...*pb.Cut) *pb.Command {
	return &pb.Command{Op: &pb.Command_NameSnapshots{NameSnapshots: &pb.NameSnapshots{Name: name, Cuts: cuts}}}
}

func deleteSnap(volume, name string) *pb.Command {
	return &pb.Command{Op: &pb.Command_DeleteSnapshot{DeleteSnapshot: &pb.DeleteSnapshot{Volume: volume, Name: name}}}
}

func cloneOf(volume, snap, name string) *pb.Command {
	return &pb.Command{Op: &pb.Command_CloneVolume{CloneVolume: &pb.CloneVolume{Volume: volume, Snapshot: snap, Name: name}}}
}

func rollback(volume, snap string) *pb.Command {
	return &pb.Command{Op: &pb.Command_RollbackVolume{RollbackVolume: &pb.RollbackVolume{Volume: volume, Snapshot: snap}}}
}

func remove(volume string) *pb.Command {
	return &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: volume}}}
}

func detachOf(v *pb.Volume) *pb.Command {
	return &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: v.Id, Epoch: v.Epoch}}}
}

// rejected demands a kind and words of the sentence.
func (c *cluster) rejected(cmd *pb.Command, k status.Kind, words ...string) {
	c.t.Helper()
	before := stateOf(c.kv)
	res := c.do(cmd)
	if status.Kind(res.Status) != k {
		c.t.Fatalf("%v: %s %q, want %s", cmd.Op, status.Kind(res.Status), res.Detail, k)
	}
	for _, w := range words {
		if !strings.Contains(res.Detail, w) {
			c.t.Fatalf("%v: %q does not say %q", cmd.Op, res.Detail, w)
		}
	}
	if !maps.Equal(before, stateOf(c.kv)) {
		c.t.Fatalf("%v: refused, and changed the state", cmd.Op)
	}
}

// stateOf is what volumes are, as bytes.
func stateOf(kv KV) map[string]string {
	out := map[string]string{}
	for _, table := range []byte{tVolume, tName, tOrigin} {
		kv.Scan([]byte{table}, nil, func(k, v []byte) bool { out[string(k)] = string(v); return true })
	}
	return out
}

// snap takes a snapshot of an attached volume as its writer does.
func (c *cluster) snap(volume, name string) {
	c.t.Helper()
	v := c.volume(volume)
	cur := v.Top
	c.ok(prepare(v, cur))
	c.ok(nameCuts(name, &pb.Cut{VolumeId: v.Id, Layer: cur, SizeBytes: v.SizeBytes}))
}

func TestASnapshotFromCutToDeletion(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.rejected(prepare(c.volume("v"), 0), status.Fenced)
	c.ok(attach("v", "host-1", false))
	c.snap("v", "a")
	c.snap("v", "b")
	v := c.volume("v")
	if v.Top != 2 || v.LastLayer != 2 || len(v.Layers) != 3 || snapshot(v, "a").Id != 0 || snapshot(v, "b").Id != 1 || snapshot(v, "b").SizeBytes != v.SizeBytes {
		t.Fatalf("%+v", v)
	}
	c.rejected(nameCuts("a", &pb.Cut{VolumeId: v.Id, Layer: 2}), status.Exists, "v", "a")
	c.rejected(nameCuts("x", &pb.Cut{VolumeId: v.Id, Layer: 2}), status.Conflict, "given up")
	c.rejected(deleteSnap("v", "x"), status.NotFound)
	c.ok(deleteSnap("v", "a")) // in the middle of the chain: it has to be merged
	if l := LayerList(c.volume("v")); l.Last != 2 || len(l.Layers) != 3 || !l.Layers[0].Merging || l.Layers[0].Into != 1 || l.Layers[1].Merging {
		t.Fatalf("%+v", l)
	}
	prune := func(layer uint32, rev uint64) *pb.Command {
		return &pb.Command{Op: &pb.Command_PruneLayer{PruneLayer: &pb.PruneLayer{VolumeId: v.Id, Epoch: v.Epoch, Revision: rev, Layer: layer}}}
	}
	c.rejected(prune(0, v.Revision+1), status.Conflict)
	c.rejected(prune(1, v.Revision), status.Conflict, "needed by itself")
	c.ok(prune(0, v.Revision))
	v = c.volume("v")
	if len(v.Layers) != 2 || layer(v, 1).HasParent {
		t.Fatalf("%+v", v.Layers)
	}
	c.snap("v", "a") // the name is free again
	if v = c.volume("v"); snapshot(v, "a").Id != 2 || v.Top != 3 {
		t.Fatalf("a layer's number was used again: %+v", v.Layers)
	}
}

// A layer is taken away only when every member has given its blocks on.
func TestNoPruneWhileAMemberIsOut(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	c.ok(allocate(c.volume("v"), 1, 0))
	c.snap("v", "a")
	c.ok(deleteSnap("v", "a"))
	c.ok(change(c.volume("v"), 2, 0))
	v := c.volume("v")
	cmd := &pb.Command{Op: &pb.Command_PruneLayer{PruneLayer: &pb.PruneLayer{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Layer: 0}}}
	c.rejected(cmd, status.Conflict, "host-2")
	c.ok(change(v, 0, 2))
	c.rejected(cmd, status.Conflict) // of before
	cmd.GetPruneLayer().Revision = c.volume("v").Revision
	c.ok(cmd)
}

// A prepared layer is given out once; a cut whose epoch ended cannot be named.
func TestACutThatWasGivenUp(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	v := c.volume("v")
	for range 2 {
		if res := c.ok(prepare(v, 0)); res.Volume.Top != 1 || res.Volume.LastLayer != 1 {
			t.Fatalf("%+v", res.Volume)
		}
	}
	c.rejected(prepare(v, 7), status.Conflict)
	c.ok(attach("v", "host-2", true))
	c.rejected(nameCuts("a", &pb.Cut{VolumeId: v.Id, Layer: 0}), status.Conflict, "given up")
	if l := LayerList(c.volume("v")); !l.Layers[0].Merging {
		t.Fatalf("the layer nobody named stays: %+v", l)
	}
	v = c.volume("v")
	c.ok(prepare(v, 1))
	given := nameCuts("", &pb.Cut{VolumeId: v.Id, Layer: 1}, &pb.Cut{VolumeId: v.Id, Layer: 2}, &pb.Cut{VolumeId: 99})
	given.GetNameSnapshots().GiveUp = true
	c.ok(given)
	if got := c.volume("v"); layer(got, 1).State != pb.LayerState_LAYER_STATE_DELETED || layer(got, 2).State != pb.LayerState_LAYER_STATE_OPEN {
		t.Fatalf("given up: %+v", got.Layers)
	}
	c.ok(attach("v", "host-2", true))
	v = c.volume("v")
	c.ok(prepare(v, 2)) // a cut that its writer went over to, and nobody named
	c.ok(prepare(v, 3))
	if got := c.volume("v"); layer(got, 2).State != pb.LayerState_LAYER_STATE_DELETED || layer(got, 3).State != pb.LayerState_LAYER_STATE_OPEN {
		t.Fatalf("%+v", got.Layers)
	}
}

// A group is one moment: if one cut cannot be named, none is.
func TestAGroupIsAllOrNothing(t *testing.T) {
	c := newCluster(t)
	var cuts []*pb.Cut
	for _, n := range []string{"v", "w"} {
		c.ok(create(n))
		c.ok(attach(n, "host-1", false))
		v := c.volume(n)
		c.ok(prepare(v, 0))
		cuts = append(cuts, &pb.Cut{VolumeId: v.Id, Layer: 0, SizeBytes: 4096})
	}
	c.rejected(nameCuts("g", cuts[0], cuts[0]), status.Invalid, "twice")
	bad := proto.Clone(cuts[1]).(*pb.Cut)
	bad.Layer = 5
	c.rejected(nameCuts("g", cuts[0], bad), status.Conflict)
	if res := c.ok(nameCuts("g", cuts...)); len(res.Volumes) != 2 || snapshot(c.volume("v"), "g") == nil || snapshot(c.volume("w"), "g") == nil {
		t.Fatalf("%+v", res)
	}
}

func TestClonesHoldWhatTheyShow(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	c.snap("v", "gold")
	c.ok(cloneOf("v", "gold", "k"))
	k := c.volume("k")
	if k.SizeBytes != 1<<30 || k.Replicas != 3 || k.Origin.GetLayer() != 0 || k.Id == c.volume("v").Id {
		t.Fatalf("%+v", k)
	}
	c.rejected(cloneOf("v", "gold", "k"), status.Exists)
	c.rejected(cloneOf("v", "none", "l"), status.NotFound)
	c.rejected(deleteSnap("v", "gold"), status.Held, "k")
	c.ok(detachOf(c.volume("v")))
	c.rejected(remove("v"), status.Held, "k")
	// A clone of the clone; the one in the middle is now held as well.
	c.ok(attach("k", "host-2", false))
	c.snap("k", "s")
	c.ok(cloneOf("k", "s", "l"))
	if o := Origins(c.kv, c.volume("l")); len(o) != 2 || o[0].Volume.Name != "k" || o[1].Volume.Name != "v" || o[1].Layer != 0 {
		t.Fatalf("%+v", o)
	}
	k = c.volume("k")
	flat := func(v *pb.Volume) *pb.Command {
		return &pb.Command{Op: &pb.Command_FlattenVolume{FlattenVolume: &pb.FlattenVolume{VolumeId: v.Id, Epoch: v.Epoch}}}
	}
	c.rejected(flat(k), status.Held, "s")
	c.rejected(deleteSnap("k", "s"), status.Held, "l")
	c.ok(attach("l", "host-3", false))
	c.ok(flat(c.volume("l")))
	c.ok(deleteSnap("k", "s"))
	c.ok(flat(k))
	c.ok(deleteSnap("v", "gold"))
	c.ok(remove("v"))
	c.ok(detachOf(c.volume("l")))
	c.ok(remove("l"))
	for i := range maxOrigins + 1 {
		c.ok(attach("k", "host-2", true))
		c.snap("k", fmt.Sprint("d", i))
		if i == 0 {
			c.ok(cloneOf("k", "d0", "c0"))
			continue
		}
		from := fmt.Sprint("c", i-1)
		c.ok(attach(from, "host-2", true))
		c.snap(from, "s")
		if i == maxOrigins-1 {
			c.rejected(cloneOf(from, "s", "deep"), status.TooBig)
			break
		}
		c.ok(cloneOf(from, "s", fmt.Sprint("c", i)))
	}
}

func TestRollback(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	c.snap("v", "a")
	c.ok(&pb.Command{Op: &pb.Command_ResizeVolume{ResizeVolume: &pb.ResizeVolume{Volume: "v", SizeBytes: 2 << 30}}})
	c.snap("v", "b")
	c.rejected(rollback("v", "a"), status.Held, "host-1")
	c.ok(detachOf(c.volume("v")))
	c.rejected(rollback("v", "c"), status.NotFound)
	c.ok(rollback("v", "a"))
	v := c.volume("v")
	if v.SizeBytes != 1<<30 || v.Top != 3 || layer(v, 3).Parent != 0 || layer(v, 2) != nil || snapshot(v, "b") == nil {
		t.Fatalf("%+v", v)
	}
	c.rejected(&pb.Command{Op: &pb.Command_ShrinkVolume{ShrinkVolume: &pb.ShrinkVolume{VolumeId: v.Id, Epoch: v.Epoch, SizeBytes: 1 << 29}}}, status.Held, "snapshot a", "delete it")
	c.ok(rollback("v", "b"))
	if v = c.volume("v"); v.SizeBytes != 2<<30 || layer(v, 4).Parent != 1 || len(v.Layers) != 3 {
		t.Fatalf("%+v", v)
	}
}

// Layers are cut, named, rolled back to, deleted and pruned at random, with
// epochs that end in between. A layer holds what was written to it, pruning gives
// it to the child: every snapshot goes on showing what it showed at its cut, a
// number is never given twice, and what a store is told fits.
func TestEverySnapshotKeepsItsContent(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 3))
		c := newCluster(t)
		c.ok(create("v"))
		c.ok(attach("v", "host-1", false))
		writer, writes := uint32(0), 0
		held := map[uint32][]int{}  // by layer
		shown := map[string][]int{} // by snapshot
		given := map[uint32]bool{0: true}
		view := func(v *pb.Volume, id uint32) (out []int) {
			for l := layer(v, id); l != nil; l = layer(v, l.Parent) {
				out = append(out, held[l.Id]...)
				if !l.HasParent {
					break
				}
			}
			slices.Sort(out)
			return out
		}
		for step := range 200 {
			v := c.volume("v")
			names := slices.Sorted(maps.Keys(shown))
			switch k := rng.IntN(10); {
			case k < 4:
				writes++
				held[writer] = append(held[writer], writes)
			case k < 6:
				res := c.do(prepare(v, writer))
				if res.Status != 0 {
					if status.Kind(res.Status) != status.TooBig {
						t.Fatalf("seed %d: %s", seed, res.Detail)
					}
					break
				}
				given[res.Volume.Top] = true
				if rng.IntN(4) == 0 {
					break // the writer never goes over
				}
				cut := writer
				writer = res.Volume.Top
				if rng.IntN(4) == 0 {
					break // nobody names it
				}
				name := fmt.Sprint("s", step)
				shown[name] = view(c.volume("v"), cut)
				c.ok(nameCuts(name, &pb.Cut{VolumeId: v.Id, Layer: cut, SizeBytes: v.SizeBytes}))
			case k == 6 && len(names) > 0:
				n := names[rng.IntN(len(names))]
				c.ok(deleteSnap("v", n))
				delete(shown, n)
			case k == 7 && len(names) > 0 && rng.IntN(2) == 0:
				n := names[rng.IntN(len(names))]
				c.ok(detachOf(v))
				res := c.do(rollback("v", n))
				top := c.ok(attach("v", "host-1", false)).Volume.Top
				if writer = top; res.Status != 0 {
					break
				}
				if given[top] || !slices.Equal(view(c.volume("v"), top), shown[n]) {
					t.Fatalf("seed %d step %d: rolled back to %v with layer %d", seed, step, view(c.volume("v"), top), top)
				}
				given[top] = true
			case k == 8:
				writer = c.ok(attach("v", "host-2", true)).Volume.Top
			default:
				for _, ref := range LayerList(v).Layers {
					if ref.Merging && ref.Id != writer {
						held[ref.Into] = append(held[ref.Into], held[ref.Id]...)
						delete(held, ref.Id)
						c.ok(&pb.Command{Op: &pb.Command_PruneLayer{PruneLayer: &pb.PruneLayer{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Layer: ref.Id}}})
						break
					}
				}
			}
			v = c.volume("v")
			for n, want := range shown {
				if got := view(v, snapshot(v, n).Id); !slices.Equal(got, want) {
					t.Fatalf("seed %d step %d: snapshot %s shows %v, at its cut %v\n%v", seed, step, n, got, want, v.Layers)
				}
			}
			checkTree(t, seed, v, writer)
		}
	}
}

func checkTree(t *testing.T, seed uint64, v *pb.Volume, writer uint32) {
	t.Helper()
	if len(v.Layers) == 0 {
		return
	}
	roots := 0
	for _, l := range v.Layers {
		if !l.HasParent {
			roots++
		} else if p := layer(v, l.Parent); p == nil || p.Id >= l.Id {
			t.Fatalf("seed %d: layer %d over %v", seed, l.Id, p)
		}
		if l.State == pb.LayerState_LAYER_STATE_DELETED && (len(children(v, l.Id)) == 0 || l.Id == writer) {
			t.Fatalf("seed %d: deleted layer %d, written %d: %v", seed, l.Id, writer, v.Layers)
		}
	}
	if top := layer(v, v.Top); roots != 1 || top == nil || len(children(v, v.Top)) != 0 || layer(v, writer) == nil {
		t.Fatalf("seed %d: %d roots, top %d: %v", seed, roots, v.Top, v.Layers)
	}
	for _, r := range LayerList(v).Layers {
		if r.Merging && r.Into <= r.Id {
			t.Fatalf("seed %d: merged down: %v", seed, r)
		}
	}
}
