package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// keyMark holds applied index (8), state hash (8), dirty (1). It is written in
// the transaction of every batch and is no part of the hash.
var keyMark = []byte{0, 'm'}

// fsm keeps the state in Badger: a rebuildable cache of the raft log, written
// without sync. A batch of entries is one transaction that also moves the
// applied index; entries at or below it are skipped. Whenever anything about
// the directory is in doubt it is emptied, and raft's snapshot and log give it
// back.
type fsm struct {
	dir   string
	table int64    // bytes of a table in memory
	lock  *os.File // flock beside dir: nobody else has this state open

	// ending is above 0 while somebody wants swap for writing: long reads, which
	// are snapshots and backups, then give up.
	ending atomic.Int32
	// swap is held for reading by whoever reads db outside of a batch, and for
	// writing while db is replaced. Whoever takes both takes mu first. A read does
	// not wait for a batch that is being applied: nothing of it has been answered
	// yet. half is held for writing while a batch is written in more than one
	// transaction, and for reading while a view is opened.
	swap   sync.RWMutex
	half   sync.RWMutex
	db     *badger.DB
	broken bool // a restore failed half way: only another one may follow

	knows uint32       // the newest state version this program knows
	fatal func(error)  // the node cannot go on
	room  func() error // whether a restore may go on; nil: always
	newer atomic.Bool  // the cluster uses a newer one: nothing is applied, read or kept any more

	mu      sync.RWMutex // guards all below; held for writing while a batch is applied
	applied uint64
	hash    uint64
	words   uint64 // of hash: state.HashWords of all pairs
	format  uint32 // the state version in use

	news news // what changed lately, for watchers

	auditAt, auditHash uint64 // the last audit applied, and the hash there

	closeErr error // of the last database that was thrown away; for the log
}

var _ raft.BatchingFSM = (*fsm)(nil)

// tableBytes is the size of Badger's tables in memory, 8 to 9 MiB. All nodes write the
// same, and with tables of one size would write them out at the same moment, with no
// majority left that is quick. It stays the same for a node: after a kill its log of
// a table is read into one of that size.
func tableBytes(id string) int64 {
	return 8<<20 + int64(crc32.ChecksumIEEE([]byte(id))%(1<<20))
}

func openBadger(dir string, tableBytes int64) (*badger.DB, error) {
	opt := badger.DefaultOptions(dir).WithLogger(nil).WithSyncWrites(false).
		WithMemTableSize(tableBytes).WithNumMemtables(2).WithBlockCacheSize(16 << 20).
		WithChecksumVerificationMode(options.OnTableRead).WithVerifyValueChecksum(true).
		WithValueLogFileSize(64 << 20).WithDetectConflicts(false).WithNumCompactors(2)
	return badger.Open(opt)
}

// openFSM opens the state in dir if it can be trusted: it must lie between the
// newest snapshot and the end of the log, and its hash must be what a scan
// gives. Otherwise it begins empty. kept says which.
//
// Badger checks its tables on goroutines of its own, and one flipped bit there
// is a panic that ends the process. A file beside dir says that an open has
// begun; a start that finds it does not try again but begins empty.
func openFSM(dir string, tableBytes int64, snapIndex, logLast uint64) (f *fsm, kept bool, err error) {
	f = &fsm{dir: dir, table: tableBytes, knows: state.Format}
	if f.lock, err = lockDir(dir); err != nil {
		return nil, false, err
	}
	if kept, err = f.open(snapIndex, logLast); err != nil {
		return nil, false, errors.Join(err, unlock(f.lock))
	}
	return f, kept, nil
}

func (f *fsm) open(snapIndex, logLast uint64) (kept bool, err error) {
	begun := f.dir + ".opening"
	mark, err := os.OpenFile(begun, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	switch {
	case errors.Is(err, os.ErrExist):
	case err != nil:
		return false, fmt.Errorf("opening the state in %s: %w", f.dir, err)
	default:
		if err := mark.Close(); err != nil {
			return false, fmt.Errorf("opening the state in %s: %w", f.dir, err)
		}
		if db, err := openBadger(f.dir, f.table); err == nil {
			f.db = db
			kept = f.trusted() && f.applied >= snapIndex && f.applied <= max(logLast, snapIndex)
		}
	}
	if !kept {
		if err := f.wipe(); err != nil {
			return false, err
		}
	}
	f.news.begin(f.applied)
	if err := os.Remove(begun); err != nil {
		return false, errors.Join(fmt.Errorf("opening the state in %s: %w", f.dir, err), f.db.Close())
	}
	return kept, nil
}

// lockDir keeps others out of dir before anything in it is judged: a state that
// cannot be opened because another process has it open must not be wiped.
func lockDir(dir string) (*os.File, error) {
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the state in %s: %w", dir, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(status.Errorf(status.Held, "the metadata in %s is in use by another process: stop it, or use another directory", dir), lock.Close())
	}
	return lock, nil
}

// halt makes long reads end, now and from now on: the node closes.
func (f *fsm) halt() { f.ending.Add(1) }

// own is mu and swap for writing. The returned function lets both go.
func (f *fsm) own() (free func()) {
	f.mu.Lock()
	f.ending.Add(1)
	f.swap.Lock()
	f.ending.Add(-1)
	return func() { f.swap.Unlock(); f.mu.Unlock() }
}

// close lets the state go. What it had not synced is in the log.
func (f *fsm) close() error {
	f.halt()
	defer f.own()()
	return errors.Join(f.db.Close(), unlock(f.lock))
}

// trusted reads the mark and compares the hash with a scan of every value.
func (f *fsm) trusted() (ok bool) {
	defer func() { // a damaged table shows as an error or as a panic
		if recover() != nil {
			ok = false
		}
	}()
	kv := newView(f.db)
	defer kv.close()
	m := kv.Get(keyMark)
	switch {
	case kv.err != nil:
		return false
	case m == nil:
	case len(m) != 17 || m[16] != 0:
		return false
	default:
		f.applied, f.hash = binary.BigEndian.Uint64(m), binary.BigEndian.Uint64(m[8:])
	}
	sum, words, err := hashAll(f.db, kv.txn)
	f.words, f.format = words, state.FormatOf(kv)
	return err == nil && kv.err == nil && sum == f.hash
}

// wipe leaves an empty database. The directory holds only what the log and
// the snapshots can give again.
func (f *fsm) wipe() error {
	if f.db != nil {
		f.closeErr = f.db.Close() // not a failure: what it could not write is deleted next
	}
	if err := os.RemoveAll(f.dir); err != nil {
		return fmt.Errorf("emptying the state in %s: %w", f.dir, err)
	}
	db, err := openBadger(f.dir, f.table)
	if err != nil {
		return fmt.Errorf("opening the state in %s: %w", f.dir, err)
	}
	f.db, f.applied, f.hash, f.words, f.format = db, 0, 0, 0, 1
	return nil
}

// at returns the applied index of the state and its hash there, as nodes compare it.
func (f *fsm) at() (applied, hash uint64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.applied, f.compared()
}

// compared is the hash that is the same on all nodes: from a state version on
// without the words of answers and events.
func (f *fsm) compared() uint64 {
	if f.format >= state.WordlessFormat {
		return f.hash - f.words
	}
	return f.hash
}

// read runs fn over the applied state.
func (f *fsm) read(fn func(kv state.KV)) error {
	f.swap.RLock()
	defer f.swap.RUnlock()
	if f.broken || f.newer.Load() {
		return status.Errorf(status.Unavailable, "the metadata state is being restored: ask again")
	}
	f.half.RLock()
	kv := newView(f.db)
	f.half.RUnlock()
	defer kv.close()
	fn(kv)
	if kv.err != nil {
		return status.Errorf(status.IO, "reading the metadata state: %w", kv.err)
	}
	return nil
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM. It panics when the state cannot be
// read or written: this node must not go on with a state of its own, and the
// next start rebuilds it.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken {
		panic("the metadata state is half restored: the next start rebuilds it")
	}
	if f.newer.Load() {
		return make([]any, len(logs))
	}
	out := make([]any, 0, len(logs))
	for len(logs) > 0 { // a part ends with an audit, at which the hash is noted
		n, cmds := 0, make([]*pb.Command, 0, len(logs))
		audit := false
		for n < len(logs) && !audit {
			cmd := commandOf(logs[n])
			if to := cmd.GetHousekeeping().GetFormat(); to > f.knows {
				f.outdated(to)
				return make([]any, len(out)+len(logs))
			}
			audit = cmd.GetHousekeeping().GetAudit()
			cmds = append(cmds, cmd)
			n++
		}
		out = append(out, f.applyPart(logs[:n], cmds)...)
		if audit && f.applied == logs[n-1].Index {
			f.auditAt, f.auditHash = f.applied, f.compared()
		}
		logs = logs[n:]
	}
	return out
}

// commandOf decodes an entry; nil: it is none of ours.
func commandOf(l *raft.Log) *pb.Command {
	if l.Type != raft.LogCommand {
		return nil
	}
	cmd := &pb.Command{}
	if err := proto.Unmarshal(l.Data, cmd); err != nil {
		panic(fmt.Sprintf("metadata log entry %d does not decode: %v", l.Index, err))
	}
	return cmd
}

func (f *fsm) applyPart(logs []*raft.Log, cmds []*pb.Command) []any {
	kv := newView(f.db)
	defer kv.close()
	over := state.NewOverlay(kv)
	out := make([]any, len(logs))
	last := f.applied
	for i, l := range logs {
		if l.Index <= f.applied {
			continue
		}
		last = l.Index
		if cmds[i] != nil {
			out[i] = state.Apply(over, cmds[i])
		}
	}
	byKey := map[string]*pb.Change{}
	words := f.words
	hash := f.hash + over.Sum(func(k, old, val []byte) {
		words += state.HashWords(k, val) - state.HashWords(k, old)
		if c := state.Hint(k, old, val); c != nil {
			byKey[string(k)] = c
		}
	})
	changes := make([]*pb.Change, 0, len(byKey))
	for _, k := range slices.Sorted(maps.Keys(byKey)) { // of events: as they happened
		changes = append(changes, byKey[k])
	}
	format := state.FormatOf(over)
	if kv.err != nil {
		panic(fmt.Sprintf("reading the metadata state: %v", kv.err))
	}
	if err := f.commit(over, last, hash); err != nil {
		panic(fmt.Sprintf("writing the metadata state: %v", err))
	}
	f.applied, f.hash, f.words, f.format = last, hash, words, format
	f.news.add(last, changes)
	return out
}

// outdated ends a node that cannot apply what comes now. Its state stays as it is
// before that: a newer program goes on from there.
func (f *fsm) outdated(used uint32) {
	if !f.newer.Swap(true) && f.fatal != nil {
		f.fatal(tooNew(used, f.knows))
	}
}

// audit returns the last audit applied and the state's hash there.
func (f *fsm) audit() (index, hash uint64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.auditAt, f.auditHash
}

func (f *fsm) auditIndex() uint64 { i, _ := f.audit(); return i }

func mark(applied, hash uint64, dirty byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, applied)
	return append(binary.BigEndian.AppendUint64(b, hash), dirty)
}

// commit writes a batch in one transaction. One too large for that is written
// in several between two marks; a crash between them leaves the dirty mark, and
// the next start rebuilds.
func (f *fsm) commit(over *state.Overlay, applied, hash uint64) error {
	db := f.db
	txn := db.NewTransaction(true)
	err := over.Changes(func(k, v []byte) error { return apply1(txn, k, v) })
	if err == nil {
		err = txn.Set(keyMark, mark(applied, hash, 0))
	}
	if err == nil {
		return txn.Commit()
	}
	txn.Discard()
	if !errors.Is(err, badger.ErrTxnTooBig) {
		return err
	}
	f.half.Lock()
	defer f.half.Unlock()
	if err := setMark(db, mark(0, 0, 1)); err != nil {
		return err
	}
	wb := db.NewWriteBatch()
	defer wb.Cancel()
	err = over.Changes(func(k, v []byte) error {
		if v == nil {
			return wb.Delete(k)
		}
		return wb.Set(k, v)
	})
	if err != nil {
		return err
	}
	if err := wb.Flush(); err != nil {
		return err
	}
	return setMark(db, mark(applied, hash, 0))
}

func apply1(txn *badger.Txn, k, v []byte) error {
	if v == nil {
		return txn.Delete(k)
	}
	return txn.Set(k, v)
}

func setMark(db *badger.DB, m []byte) error {
	return db.Update(func(txn *badger.Txn) error { return txn.Set(keyMark, m) })
}

// view is a state.KV for reading one moment of a Badger database. Its first
// error is kept in err; reads after it are worthless.
type view struct {
	txn *badger.Txn
	err error
}

var _ state.KV = (*view)(nil)

func newView(db *badger.DB) *view { return &view{txn: db.NewTransaction(false)} }

func (v *view) close() { v.txn.Discard() }

func (v *view) fail(err error) {
	if v.err == nil {
		v.err = err
	}
}

// Get implements state.KV.
func (v *view) Get(key []byte) []byte {
	item, err := v.txn.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		v.fail(err)
		return nil
	}
	val, err := item.ValueCopy([]byte{})
	if err != nil {
		v.fail(err)
		return nil
	}
	return val
}

// Set implements state.KV; a view is written only through an overlay.
func (v *view) Set([]byte, []byte) { panic("meta/server: write to a read-only view") }

// Delete implements state.KV; see Set.
func (v *view) Delete([]byte) { panic("meta/server: write to a read-only view") }

// Scan implements state.KV. The shell's own keys (0x00) are left out.
func (v *view) Scan(prefix, from []byte, fn func(key, val []byte) bool) {
	opt := badger.DefaultIteratorOptions
	opt.Prefix, opt.PrefetchValues = prefix, false // a value is beside its key; Badger would start a goroutine for each
	it := v.txn.NewIterator(opt)
	defer it.Close()
	start := prefix
	if bytes.Compare(from, start) > 0 {
		start = from
	}
	if len(start) == 0 {
		start = []byte{1}
	}
	for it.Seek(start); it.Valid(); it.Next() {
		val, err := it.Item().ValueCopy([]byte{})
		if err != nil {
			v.fail(err)
			return
		}
		if !fn(it.Item().KeyCopy(nil), val) {
			return
		}
	}
}
