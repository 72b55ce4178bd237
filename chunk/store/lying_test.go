package store

import (
	"fmt"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// A disk whose cache lies: from some sync on it says "durable" and keeps
// nothing for sure. After the power has gone, either all that was flushed is
// there, or it is noticed: by the store itself, which takes a new incarnation or
// does not open, or by the record beside it, which knows how far it had come
// (chunk/server/identity judges by Recovered and Durable). In no case does a
// block come out that was never written.
func TestALyingCache(t *testing.T) {
	outcome := map[string]int{}
	for seed := range uint64(40) {
		for _, keep := range []int{0, 50, 90} {
			what := fmt.Sprintf("seed %d, %d %% kept", seed, keep)
			d := formatMem(t)
			rules, err := disk.ParseRules(fmt.Sprintf("sync #%d.. lost", 3+seed%9))
			if err != nil {
				t.Fatal(err)
			}
			p := newPlayer(t, seed, open(t, disk.NewFaulty(d, rules, seed), testBoot))
			var models []model
			flushed := 0
			for range 60 {
				q, after := p.next()
				mustOK(t, ask(p.s, q))
				p.m = after
				models = append(models, after)
				if q.Kind == wire.Flush {
					flushed = len(models) - 1
				}
			}
			seen := p.s.Position()
			s, err := Open(Config{Disk: d.Crash(seed, keep), BootID: "boot-2"})
			if err != nil {
				if status.Of(err) != status.Corrupt {
					t.Fatalf("%s: %v", what, err)
				}
				outcome["not opened"]++
				continue
			}
			noticed := s.Incarnation() > 1 || s.Position().Recovered < seen.Durable
			if noticed {
				outcome["noticed"]++
				flushed = 0
				models = append([]model{{}}, models...)
			} else {
				outcome["whole"]++
			}
			outcome["noticed by a read"] += anyOf(t, s, models[flushed:], what)
		}
	}
	t.Logf("outcomes: %v", outcome)
	if outcome["noticed"] < 20 || outcome["whole"] == 0 {
		t.Errorf("the disk hardly lied: %v", outcome)
	}
}

// anyOf reads everything: each block is in a state of one of the models, or the
// answer says that it is not. It returns how many of the latter there are.
func anyOf(t *testing.T, s *Store, models []model, what string) (bad int) {
	t.Helper()
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b++ {
			r := ask(s, readOf(c, b, 1, 1000))
			if r.Status == status.Corrupt {
				bad++
				continue
			}
			mustOK(t, r)
			why := ""
			for i := len(models) - 1; i >= 0; i-- {
				if why = compare(models[i][blockID{c, b}], r.Entries[0], r.Data); why == "" {
					break
				}
			}
			if why != "" {
				t.Fatalf("%s: chunk %d block %d is in none of the states it may be in: %s", what, c, b, why)
			}
		}
	}
	return bad
}
