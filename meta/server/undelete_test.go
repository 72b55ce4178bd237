package server

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A deleted volume comes back with its chunks until the last moment of its time. Then
// the leader purges it by itself, what it had is free, and it is refused in a sentence.
func TestADeletedVolumeIsGoneAtItsDeadline(t *testing.T) {
	t.Parallel()
	var shift atomic.Int64 // of every node's clock, ns
	tr := newTrio(t, func(_ int, c *Config) {
		c.clock = func() time.Time { return time.Now().Add(time.Duration(shift.Load())) }
	})
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, create("v"))
	v := must(t, ctx, c, &pb.Command{Op: &pb.Command_Attach{Attach: attach("v", "host-1", "one")}}).Volume
	must(t, ctx, c, &pb.Command{Op: &pb.Command_Allocate{Allocate: &pb.Allocate{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Indices: []uint32{0, 1, 2}, PreferHost: "host-1"}}})
	must(t, ctx, c, &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: v.Id, Epoch: v.Epoch}}})
	del := &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "v", KeepSeconds: 3600}}}
	back := &pb.Command{Op: &pb.Command_UndeleteVolume{UndeleteVolume: &pb.UndeleteVolume{Volume: "v"}}}
	chunks := func() int {
		t.Helper()
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: "v"}, WithChunks: true})
		if err != nil {
			t.Fatal(err)
		}
		return len(rep.Chunks)
	}
	gone := func() bool {
		t.Helper()
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: &pb.GoneVolumes{VolumeIds: []uint64{v.Id}}}})
		if err != nil {
			t.Fatal(err)
		}
		return len(rep.Gone) == 1
	}

	must(t, ctx, c, del)
	shift.Add(int64(3590 * time.Second))
	must(t, ctx, c, back)
	if n := chunks(); n != 3 || gone() {
		t.Fatalf("undeleted with %d chunks of 3", n)
	}
	must(t, ctx, c, del)
	shift.Add(int64(3601 * time.Second))
	if _, err := c.Do(ctx, back); !errors.Is(err, status.NotFound) || !strings.Contains(err.Error(), "deleted volume") && !strings.Contains(err.Error(), "cannot be had back") {
		t.Errorf("undeleted after its time: %v", err)
	}
	until(t, func() string {
		if !gone() {
			return "a volume whose time is over is still there"
		}
		return ""
	})
	if _, err := c.Do(ctx, back); !errors.Is(err, status.NotFound) || !strings.Contains(err.Error(), "deleted volume") {
		t.Errorf("undeleted after it was purged: %v", err)
	}
	must(t, ctx, c, create("v"))
	if n := chunks(); n != 0 {
		t.Errorf("a new volume of that name has %d chunks", n)
	}
	tr.agree()
}
