package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/server/checkpoint"
	"github.com/cairnstore/cairn/chunk/server/identity"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	defaultStoreSize = 64 << 30 // of a store file whose size nobody gave
	// thinSegmentBytes: a thin store keeps room for a handful of segments.
	thinSegmentBytes = 16 << 20
	thinSegments     = 1 << 16 // more of them are listed in too large a head; larger ones then
	stepEvery        = 100 * time.Millisecond
	recordDurably    = time.Minute // between the records that survive a power loss
	scrubSaveEvery   = 10 * time.Second
	scrubEvery       = 7 * 24 * time.Hour // from one pass's end to the next one's begin
	defaultScrubPace = 16 << 20           // bytes per second
)

// hostStore is an open store with its disk, its index pages, and what was last
// seen of it.
type hostStore struct {
	*store.Store
	path   string
	kind   string // file, thin file, device
	class  string // fast, slow; "": fast
	boot   string
	disk   disk.Disk
	pages  *checkpoint.Pages
	record *identity.Record
	older  string // why it may be an older copy; "": it is not
	saved  time.Time

	mu       sync.Mutex // guards the fields below
	pace     int64      // of scrubs, bytes per second; 0: only when asked
	scrubs   string     // the file that remembers them
	scrub    scrubState
	scrubbed time.Time // when that was last written
}

// scrubState is what outlives the process of a store's scrubs.
type scrubState struct {
	Running  bool   `json:"running"`
	Segment  uint32 `json:"segment"` // where to go on
	Started  int64  `json:"startedUnixNs"`
	Finished int64  `json:"finishedUnixNs"` // of the last whole pass; 0: never
	Pace     int64  `json:"bytesPerSecond"`
}

func (s *hostStore) close() error {
	err := s.Store.Close()
	if err == nil {
		err = s.record.Save(s.seen(), true)
	}
	return errors.Join(err, s.saveScrub(), s.disk.Close(), s.pages.Close(), s.record.Close())
}

func (s *hostStore) seen() identity.Seen {
	return identity.Seen{Store: s.ID(), Incarnation: s.Incarnation(), Boot: s.boot, Position: s.Position()}
}

// openStores opens every store, making those that do not exist. One that cannot
// be opened does not keep the others from serving.
func (h *hostd) openStores() error {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot tell whether the machine lost power: %w", err)
	}
	rules, err := diskRules(h.cfg.Name)
	if err != nil {
		return err
	}
	var errs []error
	for i, sc := range h.cfg.Stores {
		o := storeOpener{sc: sc, cluster: h.cfg.Cluster, boot: string(bytes.TrimSpace(b)), rules: rules, dir: h.cfg.Dir, n: i + 1}
		s, err := o.open()
		if status.Of(err) == status.NotFound {
			err = status.Errorf(status.Corrupt, "its superblocks are gone: if the disk is damaged, or what was there may go, move the file away (a device: erase it with `wipefs -a` and `blkdiscard -z`) and start the host, which makes a new store there; the other copies are whole: `cairn store retire` the old one")
		}
		if err != nil {
			err = fmt.Errorf("store %s: %w", sc.Path, err)
			h.log.Error("a store cannot be opened", "err", err)
			errs = append(errs, err)
			continue
		}
		h.stores = append(h.stores, s)
		h.undo = append(h.undo, s.close)
	}
	if len(h.stores) == 0 {
		return errors.Join(errs...)
	}
	return nil
}

// diskRules are the faults that the environment asks for, for tests: rules of
// disk.ParseRules in CAIRN_DISK_RULES, each for every host or, after "NAME:",
// for one.
func diskRules(host string) (disk.Rules, error) {
	var mine []string
	for _, r := range strings.FieldsFunc(os.Getenv("CAIRN_DISK_RULES"), func(c rune) bool { return c == '\n' || c == ';' }) {
		if name, rule, ok := strings.Cut(r, ":"); !ok {
			mine = append(mine, r)
		} else if strings.TrimSpace(name) == host {
			mine = append(mine, rule)
		}
	}
	rules, err := disk.ParseRules(strings.Join(mine, "\n"))
	if err != nil {
		return nil, fmt.Errorf("CAIRN_DISK_RULES: %w", err)
	}
	return rules, nil
}

// storeOpener opens one store.
type storeOpener struct {
	sc            storeConfig
	cluster, boot string
	rules         disk.Rules
	dir           string // the host's
	n             int    // of its stores
}

func (o *storeOpener) file(name string) string {
	return filepath.Join(o.dir, fmt.Sprintf("%s-%d", name, o.n))
}

func (o *storeOpener) open() (_ *hostStore, err error) {
	s := &hostStore{path: o.sc.Path, class: o.sc.Class, boot: o.boot, pace: o.sc.scrub, scrubs: o.file("scrub") + ".json"}
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	f, err := disk.Open(o.sc.Path)
	if errors.Is(err, os.ErrNotExist) {
		f, err = createStore(o.sc, o.cluster)
	}
	if err != nil {
		return nil, err
	}
	s.disk = f
	undo = append(undo, func() error { return s.disk.Close() })
	switch {
	case f.Device():
		if s.kind, err = "device", formatDevice(f, o.sc.Path, o.cluster); err != nil {
			return nil, err
		}
	case o.sc.Thin:
		s.kind = "thin file"
	default:
		if s.kind, err = "file", f.Reserve(); err != nil {
			return nil, err
		}
	}
	if len(o.rules) > 0 {
		s.disk = disk.NewFaulty(f, o.rules, uint64(o.n))
	}
	if s.pages, err = checkpoint.Open(o.file("pages")); err != nil {
		return nil, err
	}
	undo = append(undo, s.pages.Close)
	if s.record, err = identity.Open(o.file("seen")); err != nil {
		return nil, err
	}
	undo = append(undo, s.record.Close)
	if err := s.loadScrub(); err != nil {
		return nil, err
	}
	if s.Store, err = store.Open(store.Config{Disk: s.disk, Cluster: o.cluster, BootID: o.boot, Pages: s.pages}); err != nil {
		return nil, err
	}
	if s.older = s.record.Judge(s.seen(), false); s.older == "" {
		err = s.record.Save(s.seen(), true)
	}
	return s, err
}

// createStore makes a store file under another name first: a crash leaves no
// half-made store behind.
func createStore(sc storeConfig, cluster string) (_ *disk.File, err error) {
	size := sc.size
	if size == 0 {
		size = defaultStoreSize
	}
	tmp := sc.Path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	d, err := disk.Create(tmp, int64(size))
	if err != nil {
		return nil, err
	}
	form := store.Format{ID: ids.NewStoreID(), Incarnation: 1, Cluster: cluster}
	if !sc.Thin {
		err = d.Reserve()
	} else if size >= 256*thinSegmentBytes {
		form.SegmentBytes = thinSegmentBytes
		for size/uint64(form.SegmentBytes) > thinSegments && form.SegmentBytes < 64<<20 {
			form.SegmentBytes *= 2
		}
	}
	if err == nil {
		err = store.Make(d, form)
	}
	if err == nil {
		err = rename(tmp, sc.Path)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close(), os.Remove(tmp))
	}
	return d, nil
}

// formatDevice makes a store on a device that holds nothing. One that holds
// anything else is refused: its owner has to say that it may go.
func formatDevice(f *disk.File, path, cluster string) error {
	const edge = 1 << 20
	b := disk.Aligned(edge)
	if f.Size() < 2*edge {
		return status.Errorf(status.Invalid, "device %s of %d bytes is too small for a store", path, f.Size())
	}
	if err := disk.ReadAt(f, b, 0); err != nil {
		return err
	}
	if bytes.HasPrefix(b, []byte("CAIRNST")) || bytes.HasPrefix(b[4096:], []byte("CAIRNST")) {
		return nil // a store, whole or damaged: store.Open says which
	}
	empty := make([]byte, edge)
	head := bytes.Equal(b, empty)
	if err := disk.ReadAt(f, b, (f.Size()-edge)/4096*4096); err != nil {
		return err
	}
	if !head || !bytes.Equal(b, empty) {
		return status.Errorf(status.Exists, "device %s holds something that is not a store: if it may go, erase it with `wipefs -a %s` and `blkdiscard -z %s`", path, path, path)
	}
	return store.Make(f, store.Format{ID: ids.NewStoreID(), Incarnation: 1, Cluster: cluster})
}

// identify makes sure, before anything is served, that no store is an older copy
// of itself. What this host's own records prove needs nobody else; for the rest
// metadata says whether the store is new, and if it is not, it gets another
// incarnation and is compared with its peers before it counts.
func (h *hostd) identify(ctx context.Context) error {
	var known map[string]*pb.Store
	for _, s := range h.stores {
		if s.older == "" {
			continue
		}
		if known == nil {
			rep, err := h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}})
			if err != nil {
				return err
			}
			known = map[string]*pb.Store{}
			for _, host := range rep.Hosts {
				for _, st := range host.Stores {
					known[string(st.Store.Id)] = st.Store
				}
			}
		}
		id := s.ID()
		if k := known[string(id[:])]; k != nil {
			if err := s.Renew(ids.Incarnation(k.Incarnation)); err != nil {
				return err
			}
			h.log.Warn("a store may be an older copy of itself: it is compared with its peers before it counts", "store", id.Short(), "path", s.path,
				"why", s.older, "incarnation", uint64(s.Incarnation()))
		}
		if err := s.record.Save(s.seen(), true); err != nil {
			return err
		}
	}
	return nil
}

// registerStores tells metadata which stores are here.
func (h *hostd) registerStores(ctx context.Context) error {
	for _, s := range h.stores {
		id := s.ID()
		st := &pb.Store{Id: id[:], Incarnation: uint64(s.Incarnation()), Host: h.cfg.Name, CapacityBytes: s.Usage().CapacityBytes, Life: uint64(s.Position().Life), Class: s.class}
		_, err := h.meta.Do(ctx, &pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: st}}})
		if status.Of(err) == status.Conflict { // somebody else has opened it: our record is worth nothing
			err = errors.Join(fmt.Errorf("%w; start this host again to let it in as that", err), s.record.Save(identity.Seen{}, true))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stepStores drives the stores' background work and remembers how far they are.
func (h *hostd) stepStores(ctx context.Context) {
	t := time.NewTicker(stepEvery)
	defer t.Stop()
	start := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			for _, s := range h.stores {
				s.step(time.Since(start), h.log)
			}
		}
	}
}

func (s *hostStore) step(now time.Duration, log *slog.Logger) {
	s.Step(now)
	durable := time.Since(s.saved) >= recordDurably
	if durable {
		s.saved = time.Now()
	}
	err := s.record.Save(s.seen(), durable)
	if err = errors.Join(err, s.stepScrub()); err != nil {
		log.Warn("what a store has done is not recorded", "store", s.ID().Short(), "err", err)
	}
}

// loadScrub reads how far the scrubs had come.
func (s *hostStore) loadScrub() error {
	b, err := os.ReadFile(s.scrubs)
	if errors.Is(err, os.ErrNotExist) {
		s.scrub.Started = time.Now().UnixNano() // the first one is due as long from now
		return nil
	}
	if err != nil {
		return err
	}
	if json.Unmarshal(b, &s.scrub) != nil {
		s.scrub = scrubState{} // it begins anew
	}
	return nil
}

func (s *hostStore) saveScrub() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := json.Marshal(s.scrub)
	if err != nil || s.scrub == (scrubState{}) {
		return err
	}
	s.scrubbed = time.Now()
	return writeFile(s.scrubs, b)
}

// scrubAge is how long ago the last whole pass ended; before the first one, how
// long ago the store was first opened, or the pass began that runs.
func (s *hostStore) scrubAge() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := s.scrub.Finished
	if from == 0 {
		from = s.scrub.Started
	}
	return time.Since(time.Unix(0, from))
}

// startScrub begins a pass, or changes the pace of the one that runs.
func (s *hostStore) startScrub(from uint32, pace int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.StartScrub(from, pace); err != nil {
		return err
	}
	if from == 0 && !s.scrub.Running {
		s.scrub.Started = time.Now().UnixNano()
	}
	s.scrub.Running, s.scrub.Pace = true, pace
	return nil
}

// stepScrub goes on with a pass that the last process began, begins one when it
// is time, and notes when one has ended.
func (s *hostStore) stepScrub() error {
	now := s.ScrubStatus()
	s.mu.Lock()
	st := s.scrub
	ended := st.Running && !now.Running && now.Passes > 0
	if ended {
		s.scrub.Running, s.scrub.Segment, s.scrub.Finished = false, 0, time.Now().UnixNano()
	} else if now.Running {
		s.scrub.Segment = now.Segment
	}
	save := ended || now.Running && time.Since(s.scrubbed) >= scrubSaveEvery
	pace := s.pace
	s.mu.Unlock()
	switch {
	case now.Running || ended:
	case st.Running: // of an earlier process
		return s.startScrub(st.Segment, max(st.Pace, 1<<20))
	case pace > 0 && time.Since(time.Unix(0, max(st.Started, st.Finished))) >= scrubEvery && s.Usage().LiveBytes > 0:
		return s.startScrub(0, pace)
	}
	if save {
		return s.saveScrub()
	}
	return nil
}
