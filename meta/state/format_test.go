package state

import (
	"errors"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func (c *cluster) raise(to uint32) {
	Apply(c.kv, &pb.Command{Op: &pb.Command_Housekeeping{Housekeeping: &pb.Housekeeping{Audit: true, Format: to}}})
}

// What is newer than the version in use changes a state exactly as it does for a
// program that does not know it; from then on it counts.
func TestWhatIsNewerIsLeftOut(t *testing.T) {
	for _, inUse := range []uint32{1, 2} {
		var sums []uint64
		for _, wish := range []bool{false, true} {
			c := fourHosts(t)
			c.raise(inUse)
			mv := plan(3, 3)
			mv.Wish = wish
			cmd := c.moves(mv)
			err := CheckFormat(c.kv, cmd)
			if refused := wish && inUse < 2; errors.Is(err, status.Unsupported) != refused || refused && !strings.Contains(err.Error(), "version 2 and the cluster uses 1") {
				t.Errorf("at version %d, wish %v: %v", inUse, wish, err)
			}
			if f := c.ok(cmd).Chunks[0].Filling; len(f) != 1 || f[0].Wish != (wish && inUse >= 2) {
				t.Errorf("at version %d, wish %v: %v", inUse, wish, f)
			}
			sums = append(sums, HashAll(c.kv))
		}
		if same := sums[0] == sums[1]; same != (inUse < 2) {
			t.Errorf("at version %d a plan with and one without a wish make the same state: %v", inUse, same)
		}
	}
}

// The version in use never falls, and raising it is told once.
func TestTheVersionInUseOnlyRises(t *testing.T) {
	c := newCluster(t)
	if got := FormatOf(c.kv); got != 1 {
		t.Errorf("a new state is of version %d", got)
	}
	for _, to := range []uint32{2, 2, 1, 0} {
		c.raise(to)
		if got := FormatOf(c.kv); got != 2 {
			t.Errorf("after %d the version is %d", to, got)
		}
	}
	told := 0
	for _, e := range Events(c.kv, 0, 1000) {
		if strings.Contains(e.What, "state version 2 is in use") {
			told++
		}
	}
	if told != 1 {
		t.Errorf("%d events tell of the new version", told)
	}
}
