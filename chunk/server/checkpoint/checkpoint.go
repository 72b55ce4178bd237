// Package checkpoint keeps the index pages of one chunk store in a Badger
// database beside it: what does not fit into memory, and checkpoints.
//
// Duty: store.Pages over Badger. Floor: F3. It holds no data of volumes, and
// nothing it holds is needed: the store proves every checkpoint by its root in
// the log and reads the whole log if there is none that holds.
package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	memTableBytes   = 8 << 20
	memTables       = 2
	blockCacheBytes = 16 << 20
	// freeFloor is what a batch leaves of the file system below: the database
	// maps its files, and a full file system is a signal there, not an error.
	freeFloor = 256 << 20
	// openFloor is what an empty database and its log may need.
	openFloor = 64 << 20
	// ownerFile marks a directory as ours to empty.
	ownerFile = "CAIRN-INDEX-PAGES"
)

// Pages is one store's saved index pages. A version of Pages is Badger's.
type Pages struct {
	dir   string
	floor uint64 // bytes to leave free
	poor  bool   // the database is in memory: there was no room to open it
	db    *badger.DB
	wg    sync.WaitGroup
	saves chan save

	mu     sync.Mutex // guards closed, and sends on saves
	closed bool
}

// save is a batch for the goroutine that writes.
type save struct {
	at    uint64
	batch []store.SavedPage
	done  func(error)
}

var _ store.Pages = (*Pages)(nil)

// Open takes dir for the pages of one store; it is made if it is missing. A
// directory with something else in it is refused (status.Exists). A database
// that does not open is emptied: the log knows all of it.
func Open(dir string) (*Pages, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of index pages: %w", err)
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the directory of index pages: %w", err)
	}
	mark := filepath.Join(dir, ownerFile)
	if _, err := os.Stat(mark); err != nil {
		if len(names) > 0 {
			return nil, status.Errorf(status.Exists, "directory %s holds something else than index pages: name an empty one", dir)
		}
		if err := os.WriteFile(mark, nil, 0o600); err != nil {
			return nil, fmt.Errorf("mark the directory of index pages: %w", err)
		}
	}
	p := &Pages{dir: dir, floor: freeFloor, saves: make(chan save, 1)}
	if p.db, err = p.open(); err != nil {
		if err := p.Wipe(); err != nil {
			return nil, err
		}
	}
	p.wg.Add(1)
	go p.write()
	return p, nil
}

func (p *Pages) options() badger.Options {
	return badger.DefaultOptions(filepath.Join(p.dir, "db")).
		WithLogger(nil).
		WithSyncWrites(true). // a batch that was answered stays
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithNumVersionsToKeep(1).      // above what Keep named, all
		WithCompression(options.None). // versions and checksums do not compress
		WithMemTableSize(memTableBytes).
		WithNumMemtables(memTables).
		WithBlockCacheSize(blockCacheBytes).
		WithValueThreshold(store.SavedPageBytes + 1). // in the tables: no value log to collect
		WithValueLogFileSize(16 << 20).
		WithChecksumVerificationMode(options.OnTableRead)
}

// Wipe forgets every page. The files are deleted rather than emptied by the
// database: whatever state a crash left them in, it is gone.
func (p *Pages) Wipe() error {
	if err := p.closeDB(); err != nil {
		return err
	}
	o := p.options()
	if err := os.RemoveAll(o.Dir); err != nil {
		return fmt.Errorf("empty the index pages: %w", err)
	}
	var err error
	if p.db, err = p.open(); err != nil {
		return fmt.Errorf("open the index pages: %w", err)
	}
	return nil
}

// open opens the database; in memory and without what is on the disk when the
// file system is so full that Badger's mapped files would find no blocks, which
// ends the process (SIGBUS). Nothing is saved then until the next opening.
func (p *Pages) open() (*badger.DB, error) {
	free, err := p.free()
	if err != nil {
		return nil, err
	}
	o := p.options()
	if p.poor = free < openFloor; p.poor {
		o = o.WithInMemory(true).WithDir("").WithValueDir("")
	}
	return badger.OpenManaged(o)
}

// free is how many bytes the file system has left for us.
func (p *Pages) free() (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(p.dir, &fs); err != nil {
		return 0, status.Errorf(status.IO, "free space below the index pages: %w", err)
	}
	return fs.Bavail * uint64(fs.Bsize), nil
}

// Save hands a batch to the goroutine that writes. The store has one in flight
// at a time, so this waits for nothing.
func (p *Pages) Save(at uint64, batch []store.SavedPage, done func(error)) {
	p.mu.Lock()
	closed := p.closed
	if !closed {
		p.saves <- save{at, batch, done}
	}
	p.mu.Unlock()
	if closed {
		done(errClosed)
	}
}

var errClosed = status.Errorf(status.Shutdown, "the index pages are closed")

func (p *Pages) write() {
	defer p.wg.Done()
	for s := range p.saves {
		s.done(p.save(s.at, s.batch))
	}
}

func (p *Pages) save(at uint64, batch []store.SavedPage) error {
	free, err := p.free()
	if err != nil {
		return err
	}
	if p.poor || free < p.floor {
		return status.Errorf(status.NoSpace, "the file system of the index pages has %d MiB left, %d MiB are kept free: make room below %s%s", free>>20, p.floor>>20, p.dir,
			map[bool]string{true: ", and start the host again"}[p.poor])
	}
	b := p.db.NewWriteBatchAt(at)
	defer b.Cancel()
	for _, s := range batch {
		var err error
		if s.Page == nil {
			err = b.Delete(s.Key)
		} else {
			err = b.Set(s.Key, s.Page)
		}
		if err != nil {
			return status.Errorf(status.IO, "save index pages: %w", err)
		}
	}
	if err := b.Flush(); err != nil {
		return status.Errorf(status.IO, "save index pages: %w", err)
	}
	return nil
}

// Get returns the newest version of a page.
func (p *Pages) Get(key []byte) ([]byte, error) {
	tx := p.db.NewTransactionAt(math.MaxUint64, false)
	defer tx.Discard()
	it, err := tx.Get(key)
	if err != nil {
		return nil, err
	}
	return it.ValueCopy(nil)
}

// Load calls f for every page as of a version.
func (p *Pages) Load(at uint64, f func(s store.SavedPage, newer bool) error) (top uint64, err error) {
	tx := p.db.NewTransactionAt(math.MaxUint64, false)
	defer tx.Discard()
	o := badger.DefaultIteratorOptions
	o.AllVersions = true // of a key, the newest first
	it := tx.NewIterator(o)
	defer it.Close()
	var key, page []byte
	var have, found, newer bool
	give := func() error {
		if !have || !newer && page == nil {
			return nil
		}
		return f(store.SavedPage{Key: key, Page: page}, newer)
	}
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		if !have || !bytes.Equal(item.Key(), key) {
			if err := give(); err != nil {
				return 0, err
			}
			key, page, have, found, newer = item.KeyCopy(nil), nil, true, false, false
		}
		top = max(top, item.Version())
		switch {
		case item.Version() > at:
			newer = true
		case found: // older still
		default:
			found = true
			if !item.IsDeletedOrExpired() {
				if page, err = item.ValueCopy(nil); err != nil {
					return 0, err
				}
			}
		}
	}
	return top, give()
}

// Keep lets Badger drop what no version from at on sees.
func (p *Pages) Keep(at uint64) { p.db.SetDiscardTs(at) }

// Close writes what was begun and closes the database.
func (p *Pages) Close() error {
	p.mu.Lock()
	if !p.closed {
		close(p.saves)
	}
	p.closed = true
	p.mu.Unlock()
	p.wg.Wait()
	return p.closeDB()
}

func (p *Pages) closeDB() error {
	if p.db == nil {
		return nil
	}
	err := p.db.Close()
	if p.db = nil; err != nil && !errors.Is(err, badger.ErrDBClosed) {
		return fmt.Errorf("close the index pages: %w", err)
	}
	return nil
}
