package fault

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Clock is the time since a run began, and a wait for one.
type Clock interface {
	Now() time.Duration
	Wait(ctx context.Context, until time.Duration) error // ctx's error when that ends first
}

// RealClock begins now.
func RealClock() Clock { return realClock{time.Now()} }

type realClock struct{ start time.Time }

func (c realClock) Now() time.Duration { return time.Since(c.start) }

func (c realClock) Wait(ctx context.Context, until time.Duration) error {
	t := time.NewTimer(until - c.Now())
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Done is an action that was tried.
type Done struct {
	Action
	Name string        // whom it hit; "" when there was nobody
	Late time.Duration // after its time
	Note string        // why it had no effect; "" when it had
}

// String is a line of a script: replaying the lines of a run repeats it, with
// the leader of that time by name. What had no effect, and releases, which
// follow from their hold, are comments.
func (d Done) String() string {
	a := d.Action
	if d.Name != "" {
		a.Target = d.Name
	}
	switch {
	case d.Note != "":
		return fmt.Sprintf("# %v: %s", a, d.Note)
	case a.Do == release:
		return fmt.Sprintf("# %v", a)
	case d.Target == leader:
		return fmt.Sprintf("%v # the metadata leader", a)
	}
	return a.String()
}

// Config is what a run needs.
type Config struct {
	Scheduler *Scheduler
	Cluster   Cluster
	Clock     Clock      // nil: RealClock
	Log       func(Done) // called for each action, one at a time; may be nil
}

// Run acts until ctx ends or the schedule does, then releases what it held and
// waits for pauses to end (at most maxFor). It returns an error when the
// cluster could not be acted on, not when ctx ended.
func Run(ctx context.Context, cfg Config) error {
	r := &runner{Config: cfg, holds: map[int]string{}, held: map[string]int{}, failed: make(chan error, 1)}
	if r.Clock == nil {
		r.Clock = RealClock()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.cancel = cancel
	err := r.loop(ctx)
	r.pauses.Wait()
	for name := range r.held {
		err = errors.Join(err, r.Cluster.Release(name))
	}
	select {
	case perr := <-r.failed:
		return errors.Join(perr, err)
	default:
		return err
	}
}

type runner struct {
	Config
	cancel context.CancelCauseFunc
	holds  map[int]string // id of a hold → whom it holds
	held   map[string]int // name → holds not yet released; > 0
	pauses sync.WaitGroup
	failed chan error // the first pause that failed
	mu     sync.Mutex // Log: pauses end beside the loop
}

func (r *runner) loop(ctx context.Context) error {
	for {
		due, any := r.Scheduler.Due()
		if !any || r.Clock.Wait(ctx, due) != nil {
			return nil
		}
		for _, a := range r.Scheduler.Next(r.Clock.Now()) {
			if ctx.Err() != nil {
				return nil
			}
			if err := r.act(a); err != nil {
				return err
			}
		}
	}
}

// act does one action. Nobody to hit is noted, anything else is an error.
func (r *runner) act(a Action) error {
	d := Done{Action: a, Name: a.Target, Late: max(0, r.Clock.Now()-a.At)}
	if a.Do == release {
		return r.release(d)
	}
	if a.Target == leader {
		name, err := r.Cluster.MetaLeader()
		if err != nil && !isAbsent(err) {
			return fmt.Errorf("%v: find the metadata leader: %w", a, err)
		}
		if err != nil {
			d.Name, d.Note = "", err.Error()
			r.log(d)
			return nil
		}
		d.Name = name
	}
	switch a.Do {
	case Pause:
		r.pause(d)
		return nil
	case Hold:
		if err := r.Cluster.Hold(d.Name); err != nil {
			return fmt.Errorf("%v: %w", a, err)
		}
		r.holds[a.id] = d.Name
		r.held[d.Name]++
		if err := r.Cluster.Kill(d.Name); err != nil && !isAbsent(err) {
			return fmt.Errorf("%v: %w", a, err)
		}
		r.log(d) // also when it was down already: now it stays down
		return nil
	}
	return r.finish(d, r.Cluster.Kill(d.Name))
}

// pause runs beside the loop, so that a fault can meet a paused process.
func (r *runner) pause(d Done) {
	r.pauses.Go(func() {
		if err := r.finish(d, r.Cluster.Pause(d.Name, d.For)); err != nil {
			select {
			case r.failed <- err:
				r.cancel(err)
			default: // one is enough
			}
		}
	})
}

func (r *runner) release(d Done) error {
	name, ok := r.holds[d.id]
	if !ok {
		return nil // its hold found no leader
	}
	d.Name = name
	delete(r.holds, d.id)
	if r.held[name]--; r.held[name] > 0 {
		d.Note = "another hold goes on"
		r.log(d)
		return nil
	}
	delete(r.held, name)
	return r.finish(d, r.Cluster.Release(name))
}

// finish logs an action by its outcome.
func (r *runner) finish(d Done, err error) error {
	if err != nil && !isAbsent(err) {
		return fmt.Errorf("%v: %w", d.Action, err)
	}
	if err != nil {
		d.Note = err.Error()
	}
	r.log(d)
	return nil
}

// isAbsent says that there was nobody to hit just now.
func isAbsent(err error) bool {
	return errors.Is(err, status.NotFound) || errors.Is(err, status.Unavailable)
}

func (r *runner) log(d Done) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Log != nil {
		r.Log(d)
	}
}
