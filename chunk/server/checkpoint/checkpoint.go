// Package checkpoint keeps the index pages of chunk stores that do not fit
// into memory, in a Badger database beside the store.
//
// Duty: store.Spill over Badger. Floor: F3. It is scratch space, not a promise:
// it is emptied when it is opened, and the store rebuilds its index from the
// log. It holds no data of volumes.
package checkpoint

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	memTableBytes   = 8 << 20
	memTables       = 2
	blockCacheBytes = 16 << 20
	// ownerFile marks a directory as ours to empty.
	ownerFile = "CAIRN-INDEX-SPILL"
)

// Pages is one store's spilled index pages.
type Pages struct {
	dir string
	db  *badger.DB // nil until Wipe
}

var _ store.Spill = (*Pages)(nil)

// Open takes dir for the pages of one store; it is made if it is missing. A
// directory with something else in it is refused (status.Exists). Nothing can
// be kept before Wipe, which store.Open calls.
func Open(dir string) (*Pages, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the index spill directory: %w", err)
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the index spill directory: %w", err)
	}
	mark := filepath.Join(dir, ownerFile)
	if _, err := os.Stat(mark); err != nil {
		if len(names) > 0 {
			return nil, status.Errorf(status.Exists, "directory %s holds something else than an index spill: name an empty one", dir)
		}
		if err := os.WriteFile(mark, nil, 0o600); err != nil {
			return nil, fmt.Errorf("mark the index spill directory: %w", err)
		}
	}
	return &Pages{dir: dir}, nil
}

// Wipe forgets every page. The files are deleted rather than emptied by the
// database: whatever state a crash left them in, it is gone.
func (p *Pages) Wipe() error {
	if err := p.Close(); err != nil {
		return err
	}
	db := filepath.Join(p.dir, "db")
	if err := os.RemoveAll(db); err != nil {
		return fmt.Errorf("empty the index spill: %w", err)
	}
	o := badger.DefaultOptions(db).
		WithLogger(nil).
		WithSyncWrites(false). // scratch
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithNumVersionsToKeep(1).
		WithCompression(options.None). // versions and checksums do not compress
		WithMemTableSize(memTableBytes).
		WithNumMemtables(memTables).
		WithBlockCacheSize(blockCacheBytes).
		WithValueThreshold(store.SpillPageBytes + 1). // in the tables: no value log to collect
		WithValueLogFileSize(16 << 20).
		WithChecksumVerificationMode(options.OnTableRead)
	var err error
	if p.db, err = badger.Open(o); err != nil {
		return fmt.Errorf("open the index spill: %w", err)
	}
	return nil
}

// Put keeps a copy of page.
func (p *Pages) Put(key, page []byte) error {
	return p.db.Update(func(tx *badger.Txn) error { return tx.Set(key, page) })
}

// Get returns the last page put under key.
func (p *Pages) Get(key []byte) ([]byte, error) {
	var page []byte
	err := p.db.View(func(tx *badger.Txn) error {
		it, err := tx.Get(key)
		if err != nil {
			return err
		}
		page, err = it.ValueCopy(nil)
		return err
	})
	return page, err
}

// Delete forgets a page.
func (p *Pages) Delete(key []byte) error {
	return p.db.Update(func(tx *badger.Txn) error { return tx.Delete(key) })
}

// Close closes the database; the pages are worthless from then on.
func (p *Pages) Close() error {
	if p.db == nil {
		return nil
	}
	err := p.db.Close()
	p.db = nil
	if err != nil {
		return fmt.Errorf("close the index spill: %w", err)
	}
	return nil
}
