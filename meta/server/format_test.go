package server

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Three nodes of state version 1 become nodes of version 2, one at a time and one
// of them back and forth, under commands of which none fails. What is of version
// 2 is refused until all know it, and taken then; from then on a program of version
// 1 is refused its directory, and the log.
func TestUpgradeNodeByNodeAndTheWayBack(t *testing.T) {
	t.Parallel()
	formats := [3]uint32{1, 1, 1}
	tr := newTrio(t, func(i int, c *Config) { c.format = formats[i] })
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	newer := func() error {
		_, err := c.Do(ctx, &pb.Command{Op: &pb.Command_MoveChunks{MoveChunks: &pb.MoveChunks{VolumeId: 1 << 40, Moves: []*pb.ChunkMove{{Wish: true}}}}})
		return err
	}
	restart := func(i int, format uint32) {
		tr.stop(i)
		progress(t, ctx, c)
		formats[i] = format
		tr.start(i)
		until(t, func() string {
			lead := tr.nodes[tr.leader()].node()
			if n := tr.nodes[i].node(); n.Applied+5 < lead.Applied || n.Format != format {
				return fmt.Sprintf("%s lags: %d of %d", n.Id, n.Applied, lead.Applied)
			}
			return ""
		})
	}
	stop := busy(t, ctx, tr.addrs(), 2)
	for _, step := range []struct {
		node   int
		format uint32
	}{{0, 2}, {1, 2}, {0, 1}, {0, 2}} {
		restart(step.node, step.format)
		if err := newer(); !errors.Is(err, status.Unsupported) || !strings.Contains(err.Error(), "upgrade every metadata node first") {
			t.Fatalf("with nodes of versions %v a newer command is answered %v", formats, err)
		}
	}
	restart(2, 2)
	until(t, func() string {
		for _, s := range tr.nodes {
			if n := s.node(); n.FormatInUse != 2 {
				return fmt.Sprintf("all know version 2 and %s uses %d", n.Id, n.FormatInUse)
			}
		}
		return ""
	})
	if err := newer(); errors.Is(err, status.Unsupported) {
		t.Errorf("a newer command after the upgrade: %v", err)
	}
	t.Logf("%d volumes made meanwhile", stop())
	tr.agree()

	tr.stop(0)
	formats[0] = 1
	old := func() (*Server, error) {
		p := tr.peers[0]
		return New(tr.config(0, listen(t, p.RaftAddr), listen(t, p.APIAddr)))
	}
	if _, err := old(); !errors.Is(err, status.Unsupported) || !strings.Contains(err.Error(), "start the newer program") {
		t.Errorf("an older program's start: %v", err)
	}
	if err := os.RemoveAll(tr.dirs[0]); err != nil { // without a state it learns it from the log
		t.Fatal(err)
	}
	s, err := old()
	if err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if !errors.Is(s.Err(), status.Unsupported) {
		t.Errorf("an older program that is given a newer log ends with %v", s.Err())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	formats[0] = 2
	tr.start(0)
	tr.agree()
}
