// Package kernel keeps the Linux kernel's routes as package netplane wants
// them, in one network namespace.
//
// Duty: read the kernel's state and make changes by netlink, and do so again
// whenever something was taken away: a link that goes down loses its routes
// and its IPv6 addresses, and nothing brings them back when it comes up.
// Floor: F3. It does not decide what is wanted, creates no links, and never
// touches a route of another protocol number.
package kernel

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	// maxRounds bounds the looks of one pass: each finds what the changes of
	// the one before made possible. Links and addresses, routes, and one look
	// that finds nothing left to do.
	maxRounds = 4
	// retryAfter is the wait after a pass that failed; no event may follow.
	retryAfter = time.Second
	// auditEvery bounds how long a lost event goes unnoticed.
	auditEvery = 30 * time.Second
)

// Config says where to work.
type Config struct {
	Namespace   string       // name of a network namespace, as ip-netns(8) has it; "": see NamespaceFD
	NamespaceFD int          // descriptor of one, which stays the caller's; 0: the calling thread's
	Log         *slog.Logger // nil: no log
	// Observe is called after each pass that changed something or saw other
	// problems than the pass before; from the reconciler's goroutine. May be nil.
	Observe func(Report)
}

// Report is what a pass did and what it could not do.
type Report struct {
	Changes  []netplane.Change // made, in order
	Problems []string          // what keeps the rest from being had
	Err      error             // a change that failed; it is tried again
}

// Reconciler keeps one namespace as wanted until it is closed. Its methods may
// be called concurrently.
type Reconciler struct {
	cfg     Config
	handle  *handle
	watch   *watch
	applies chan applyRequest
	stop    chan struct{}
	done    chan struct{}
	close   sync.Once
	closed  error

	// Of the goroutine.
	want    netplane.Config
	applied bool // there is a want
	memory  netplane.Memory

	mu   sync.Mutex
	last Report // of the last pass; guarded by mu
}

type applyRequest struct {
	cfg   netplane.Config
	reply chan Report
}

// New starts a reconciler that wants nothing yet and touches nothing.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	ns, err := openNamespace(cfg)
	if err != nil {
		return nil, err
	}
	h, err := openHandle(ns)
	if err != nil {
		return nil, errors.Join(err, ns.close())
	}
	w, err := startWatch(ns)
	if err != nil {
		h.nl.Close()
		return nil, errors.Join(err, ns.close())
	}
	r := &Reconciler{cfg: cfg, handle: h, watch: w, applies: make(chan applyRequest), stop: make(chan struct{}), done: make(chan struct{})}
	go r.run()
	return r, nil
}

// Apply makes the network as wanted, now and from now on, and reports the
// first pass. An invalid config changes nothing. Report.Err and Problems do
// not end the trying.
func (r *Reconciler) Apply(want netplane.Config) (Report, error) {
	want, err := want.Normal()
	if err != nil {
		return Report{}, err
	}
	req := applyRequest{want, make(chan Report, 1)}
	select {
	case r.applies <- req:
		rep := <-req.reply
		return rep, rep.Err
	case <-r.done:
		return Report{}, status.Errorf(status.Shutdown, "the route reconciler is closed")
	}
}

// Clear takes away all routes of ours, and the addresses of the last config.
func (r *Reconciler) Clear() error {
	_, err := r.Apply(netplane.Config{})
	return err
}

// Status is the last pass's report, its changes left out.
func (r *Reconciler) Status() Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// State is what the kernel has now, anybody's routes included.
func (r *Reconciler) State() (netplane.State, error) {
	st, _, err := r.handle.state(nil)
	return st, err
}

// Close ends the watching. The network stays as it is: connections of other
// processes must outlive this one. Clear first to take it away.
func (r *Reconciler) Close() error {
	r.close.Do(func() {
		close(r.stop)
		<-r.done
		werr := r.watch.close()
		r.handle.nl.Close()
		r.closed = errors.Join(werr, r.handle.ns.close())
	})
	return r.closed
}

func (r *Reconciler) run() {
	defer close(r.done)
	timer := time.NewTimer(auditEvery)
	defer timer.Stop()
	for {
		var reply chan Report
		select {
		case <-r.stop:
			return
		case req := <-r.applies:
			r.want, r.applied, reply = req.cfg, true, req.reply
			r.memory.Want(r.want)
			r.watch.setRoutes(r.want.Routes)
		case <-r.watch.kick:
		case <-timer.C:
		}
		rep := Report{}
		if r.applied {
			rep = r.pass()
			r.publish(rep)
		}
		if reply != nil {
			reply <- rep
		}
		timer.Reset(r.wait(rep))
	}
}

func (r *Reconciler) wait(rep Report) time.Duration {
	if rep.Err != nil {
		return retryAfter
	}
	return auditEvery
}

// pass looks and changes until there is nothing to change or nothing helps.
func (r *Reconciler) pass() Report {
	var rep Report
	for range maxRounds {
		have, index, err := r.handle.state(netplane.Settings(r.want))
		if err != nil {
			rep.Err = err
			return rep
		}
		r.memory.Saw(have)
		changes, problems := netplane.Plan(r.want, &r.memory, have)
		rep.Problems = problems
		if len(changes) == 0 {
			return rep
		}
		var errs []error
		for _, c := range changes { // one failure must not keep other routes from being set
			if err := r.handle.apply(c, index); err != nil {
				errs = append(errs, err)
				continue
			}
			rep.Changes = append(rep.Changes, c)
		}
		if len(errs) > 0 {
			rep.Err = errors.Join(errs[:min(len(errs), maxErrs)]...)
			return rep
		}
	}
	rep.Err = status.Errorf(status.Unavailable, "the network is not as wanted after %d rounds of changes: something else keeps changing it back", maxRounds)
	return rep
}

// maxErrs bounds the errors of one report.
const maxErrs = 8

// publish remembers a report and tells those who listen, if it has news.
func (r *Reconciler) publish(rep Report) {
	r.mu.Lock()
	old := r.last
	r.last = Report{Problems: rep.Problems, Err: rep.Err}
	r.mu.Unlock()
	for _, c := range rep.Changes {
		r.cfg.Log.Info("storage network changed", "change", c.String())
	}
	news := !slices.Equal(old.Problems, rep.Problems) || text(old.Err) != text(rep.Err)
	if news {
		for _, p := range rep.Problems {
			r.cfg.Log.Warn("storage network incomplete", "problem", p)
		}
		if rep.Err != nil {
			r.cfg.Log.Error("storage network not as wanted", "err", rep.Err)
		}
	}
	if r.cfg.Observe != nil && (news || len(rep.Changes) > 0) {
		r.cfg.Observe(rep)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// routeSet is what routes the watch cares about.
type routeSet map[netip.Prefix]bool

func newRouteSet(routes []netplane.Route) routeSet {
	set := make(routeSet, len(routes))
	for _, r := range routes {
		set[r.To] = true
	}
	return set
}
