package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// One volume as a register with operations: what porcupine compares with.
type register struct {
	there bool
	size  uint64
	epoch uint32
}

type opKind int

const (
	opCreate opKind = iota
	opRemove
	opGrow
	opAttach
	opRead
)

type asked struct {
	kind   opKind
	volume int
	size   uint64
}

// answer is what an operation was told; unknown: nothing.
type answer struct {
	unknown bool
	kind    status.Kind
	register
}

// step says whether an answer fits a state, and what follows.
func step(s register, in asked, out answer) (bool, register) {
	if in.kind == opRead {
		return out.unknown || out.there == s.there && (!s.there || out.size == s.size && out.epoch == s.epoch), s
	}
	want, next := status.OK, s
	switch {
	case in.kind == opCreate && s.there:
		want = status.Exists
	case in.kind == opCreate:
		next = register{there: true, size: in.size}
	case !s.there:
		want = status.NotFound
	case in.kind == opRemove:
		next = register{}
	case in.kind == opGrow && in.size < s.size:
		want = status.Invalid
	case in.kind == opGrow:
		next.size = in.size
	case in.kind == opAttach:
		next.epoch++
	}
	if out.unknown {
		return true, next
	}
	if want == status.OK && in.kind == opAttach && out.kind == status.Fenced { // done, and overtaken before it was answered
		return true, next
	}
	fits := out.kind == want
	if fits && in.kind == opAttach && want == status.OK {
		fits = out.epoch == next.epoch
	}
	return fits, next
}

// model takes an operation of unknown outcome for one that is done at some time
// from the question on. One that was never done fits too: it may come after
// everything else, as its answer never came.
var model = porcupine.Model{
	Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
		by := map[int][]porcupine.Operation{}
		for _, o := range h {
			by[o.Input.(asked).volume] = append(by[o.Input.(asked).volume], o)
		}
		var out [][]porcupine.Operation
		for _, ops := range by {
			out = append(out, ops)
		}
		return out
	},
	Init: func() any { return register{} },
	Step: func(s, in, out any) (bool, any) { return step(s.(register), in.(asked), out.(answer)) },
}

// ask puts one operation and says what was told.
func ask(ctx context.Context, c *client.Client, in asked) answer {
	name := fmt.Sprintf("v%d", in.volume)
	cmd := &pb.Command{}
	switch in.kind {
	case opCreate:
		cmd.Op = &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: in.size}}
	case opRemove:
		cmd.Op = &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name}}
	case opGrow:
		cmd.Op = &pb.Command_ResizeVolume{ResizeVolume: &pb.ResizeVolume{Volume: name, SizeBytes: in.size}}
	case opAttach: // by the same session: it waits for no lease
		cmd.Op = &pb.Command_Attach{Attach: attach(name, "host-1", "one")}
	case opRead:
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: name}})
		switch {
		case err == nil:
			v := rep.Volumes[0]
			return answer{register: register{true, v.SizeBytes, v.Epoch}}
		case errors.Is(err, status.NotFound):
			return answer{}
		}
		return answer{unknown: true}
	}
	res, err := c.Do(ctx, cmd)
	k := status.Of(err)
	if k == status.Unknown || k == status.Unavailable || k == status.Timeout || k == status.Expired {
		return answer{unknown: true}
	}
	return answer{kind: k, register: register{epoch: res.GetVolume().GetEpoch()}}
}

// Every metadata operation is linearizable under leaders that are cut off from
// one side or both, nodes that are stopped and started, and clocks that jump.
//
//	CAIRN_META_OPS=100000 CAIRN_META_FAULTS=200 go test -v -timeout 1h -run Linearizable ./meta/server
func TestMetadataIsLinearizable(t *testing.T) {
	t.Parallel()
	wantOps, wantFaults := number(t, "CAIRN_META_OPS", 2000), number(t, "CAIRN_META_FAULTS", 5)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	var shift [3]atomic.Int64 // of each node's clock, ns
	tr, wires := wired(t, func(i int, c *Config) {
		c.clock = func() time.Time { return time.Now().Add(time.Duration(shift[i].Load())) }
		c.snapEvery = 500
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Minute)
	defer cancel()
	c := tr.client()
	hostUp(t, ctx, c, 1)

	var mu sync.Mutex
	var history []porcupine.Operation
	unread := 0
	var stop atomic.Bool
	var wg sync.WaitGroup
	began := time.Now()
	const clients = 32
	for id := range clients {
		mine := rand.New(rand.NewPCG(seed, uint64(id)+1))
		wg.Go(func() {
			cl := client.New(client.Config{Addrs: tr.addrs(), Who: fmt.Sprint(id)})
			for !stop.Load() {
				in := asked{kind: opKind(mine.IntN(5)), volume: mine.IntN(256), size: uint64(1+mine.IntN(8)) << 30}
				if in.kind == opRemove || in.kind == opAttach {
					in.volume = in.volume&^1 | int(in.kind/opAttach) // those that are attached are never removed
				}
				at := time.Since(began)
				octx, end := context.WithTimeout(ctx, 20*time.Second)
				out := ask(octx, cl, in)
				end()
				op := porcupine.Operation{ClientId: id, Input: in, Output: out, Call: int64(at), Return: int64(time.Since(began))}
				if out.unknown {
					op.Return = int64(100 * time.Hour)
				}
				mu.Lock()
				if in.kind == opRead && out.unknown { // says nothing
					unread++
				} else {
					history = append(history, op)
				}
				mu.Unlock()
			}
			if err := cl.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(history) }
	faults := map[string]int{}
	for n := 0; n < wantFaults || count() < wantOps; n++ {
		before := count()
		what := tr.fault(rng, wires, &shift)
		faults[what]++
		until(t, func() string { // it goes on before the next one
			if count() < before+wantOps/max(1, wantFaults)/2 {
				return fmt.Sprintf("after fault %d (%s) only %d operations were answered", n, what, count()-before)
			}
			return ""
		})
		for _, w := range wires {
			w.set(false)
		}
	}
	stop.Store(true)
	wg.Wait()
	unknown := 0
	for _, o := range history {
		if o.Output.(answer).unknown {
			unknown++
		}
	}
	took := time.Since(began)
	t.Logf("%d operations, %d of unknown outcome, %d reads without an answer, in %v, after %v", len(history), unknown, unread, took.Round(time.Second), faults)
	res := porcupine.CheckOperationsTimeout(model, history, 5*time.Minute)
	t.Logf("%d operations (%d of unknown outcome) over %v in %v: %v", len(history), unknown, faults, took.Round(time.Second), res)
	if res != porcupine.Ok {
		for _, volume := range model.Partition(history) {
			explain(t, volume)
		}
		t.Fatalf("seed %d: the history is %v", seed, res)
	}
	tr.agree()
}

func number(t *testing.T, env string, otherwise int) int {
	t.Helper()
	text := os.Getenv(env)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%q is no number", env, text)
	}
	return n
}

// fault does something bad and says what. Wires are mended by the caller.
func (tr *trio) fault(rng *rand.Rand, wires map[[2]int]*wire, shift *[3]atomic.Int64) string {
	lead := tr.leader()
	switch rng.IntN(6) {
	case 0:
		for pair, w := range wires {
			if pair[0] == lead || pair[1] == lead {
				w.set(true)
			}
		}
		return "leader cut off"
	case 1:
		for pair, w := range wires {
			if pair[0] == lead {
				w.set(true)
			}
		}
		return "leader mute"
	case 2:
		other := (lead + 1 + rng.IntN(2)) % 3
		for pair, w := range wires {
			if pair[1] == other {
				w.set(true)
			}
		}
		return "follower deaf"
	case 3:
		tr.stop(lead)
		tr.start(lead)
		return "leader restarted"
	case 4:
		other := (lead + 1 + rng.IntN(2)) % 3
		tr.stop(other)
		tr.start(other)
		return "follower restarted"
	}
	shift[rng.IntN(3)].Store(rng.Int64N(int64(40*time.Minute)) - int64(20*time.Minute))
	return "clock jump"
}

// explain prints where one volume's history goes wrong: the first answer that fits
// nothing, and what was asked and answered shortly before.
func explain(t *testing.T, ops []porcupine.Operation) {
	fits := func(until int64) bool { // what is answered later may be done or not
		var h []porcupine.Operation
		for _, o := range ops {
			if o.Call > until {
				continue
			}
			if o.Return > until {
				o.Output, o.Return = answer{unknown: true}, int64(100*time.Hour)
			}
			h = append(h, o)
		}
		return porcupine.CheckOperationsTimeout(model, h, time.Minute) == porcupine.Ok
	}
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
	wrong := sort.Search(len(ops), func(i int) bool { return !fits(ops[i].Return) })
	if wrong == len(ops) {
		return
	}
	for _, o := range ops[max(0, wrong-20) : wrong+1] {
		in, out := o.Input.(asked), o.Output.(answer)
		t.Logf("volume %d: %s of size %d asked at %v and answered at %v: unknown %v, %v, %+v", in.volume,
			[]string{"creation", "removal", "growth", "attach", "read"}[in.kind], in.size, time.Duration(o.Call), time.Duration(o.Return), out.unknown, out.kind, out.register)
	}
	t.Log("and there is no order that this fits")
}
