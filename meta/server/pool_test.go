package server

import (
	"fmt"
	"sync"
	"testing"

	"github.com/cairnstore/cairn/proto/pb"
)

// The pool and its volumes are of one moment, however many come and go: what is
// told of the pool is the sum of what is told of them.
func TestPoolIsOfOneMoment(t *testing.T) {
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		wg.Go(func() {
			c := tr.client()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("v-%d-%d", w, i)
				must(t, ctx, c, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: 1 << 30, Replicas: 1}}})
				must(t, ctx, c, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name, KeepSeconds: 60}}})
			}
		})
	}
	changed := map[int]bool{}
	for len(changed) < 20 && ctx.Err() == nil {
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Tenants{Tenants: true}, WithVolumes: true})
		if err != nil {
			t.Error(err)
			break
		}
		var logical, placed uint64
		for _, v := range rep.Volumes {
			logical += v.SizeBytes
			placed += v.ChunkCount * v.ChunkBytes * uint64(v.Replicas)
		}
		if logical != rep.Pool.LogicalBytes || placed != rep.Pool.PlacedBytes {
			t.Errorf("volumes of %d bytes, %d placed; the pool says %d, %d", logical, placed, rep.Pool.LogicalBytes, rep.Pool.PlacedBytes)
			break
		}
		changed[len(rep.Volumes)] = true
	}
	close(stop)
	wg.Wait()
	if len(changed) < 20 && !t.Failed() {
		t.Errorf("only %d different moments were seen", len(changed))
	}
}
