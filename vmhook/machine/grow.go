package machine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Growing a disk online, and replacing a dead connection, are one sequence,
// because an NBD node keeps the size it was opened with and, once it has given
// up, never connects again:
//
//	1 find the device's nodes                 query-block, query-named-block-nodes
//	2 open the export once more               blockdev-add  diskN-nbdG+1
//	3 check that the server has the new size
//	4 put a raw node over it                  blockdev-add  diskN-rawG+1
//	5 move the guest's device onto that       qom-set       vdN drive
//	6 tell the guest the size                 block_resize  diskN-rawG+1
//	7 drop the old nodes                      blockdev-del
//
// Step 5 could be a blockdev-reopen of one raw node that stays; but that
// flushes the old connection first, and fails when it is dead. Nothing is lost
// without: a cairn export's flush covers every connection (multi-conn), so the
// guest's next one covers what went over the old connection.
//
// A node in use cannot be dropped, so step 7 drops what it can, and a sequence
// cut short by a crash of the host process is cleaned up by the next one.

const (
	// openSec bounds step 2, in seconds. QEMU answers nothing else meanwhile,
	// and a server that accepts and then says nothing would hold it up for
	// ever. (yank, meant for that, does not reach a node that is being opened.)
	openSec = 4
	// replaceTimeout bounds the sequence.
	replaceTimeout = 15 * time.Second
)

// Grow makes the guest see that disk (an index into Spec.Disks) has sizeBytes
// now. The disk's server must export that size already. The size the guest
// sees already is fine, a smaller one is refused.
func (m *Machine) Grow(ctx context.Context, disk int, sizeBytes uint64) error {
	if disk < 0 || disk >= len(m.spec.Disks) {
		return status.Errorf(status.Invalid, "VM %s has no disk %d", m.spec.Name, disk)
	}
	if sizeBytes == 0 || sizeBytes%512 != 0 {
		return status.Errorf(status.Invalid, "disk %d of VM %s: size %d is no multiple of 512 bytes", disk, m.spec.Name, sizeBytes)
	}
	m.ops.Lock()
	defer m.ops.Unlock()
	if err := m.settled(); err != nil {
		return err
	}
	return m.replaceNode(ctx, disk, sizeBytes)
}

// SizeBytes returns the size the guest sees of a disk.
func (m *Machine) SizeBytes(ctx context.Context, disk int) (uint64, error) {
	var list []struct {
		QDev     string `json:"qdev"`
		Inserted struct {
			Image struct {
				Size uint64 `json:"virtual-size"`
			} `json:"image"`
		} `json:"inserted"`
	}
	if err := m.do(ctx, "query-block", nil, &list); err != nil {
		return 0, err
	}
	for _, d := range list {
		// The device is named by its path, /machine/peripheral/vdN/…
		if strings.Contains(d.QDev+"/", "/"+qdevOf(disk)+"/") {
			return d.Inserted.Image.Size, nil
		}
	}
	return 0, status.Errorf(status.NotFound, "VM %s has no disk %d", m.spec.Name, disk)
}

// replaceNode runs the sequence; sizeBytes 0 keeps the size. Called with ops
// held.
func (m *Machine) replaceNode(ctx context.Context, disk int, sizeBytes uint64) error {
	ctx, cancel := context.WithTimeout(ctx, replaceTimeout)
	defer cancel()
	now, err := m.SizeBytes(ctx, disk)
	if err != nil {
		return err
	}
	nodes, err := m.blockNodes(ctx)
	if err != nil {
		return err
	}
	if sizeBytes == now {
		return nil // asked twice
	}
	if sizeBytes == 0 {
		sizeBytes = now
	}
	if sizeBytes < now {
		return status.Errorf(status.Invalid, "disk %d of VM %s has %d bytes; a running guest's disk cannot shrink to %d", disk, m.spec.Name, now, sizeBytes)
	}
	gen := nextGen(nodes, disk)
	if err := m.moveTo(ctx, disk, gen, sizeBytes); err != nil {
		return errors.Join(err, m.dropNodes(rawNode(disk, gen), nbdNode(disk, gen)))
	}
	if sizeBytes != now {
		if err := m.do(ctx, "block_resize", object{"node-name": rawNode(disk, gen), "size": sizeBytes}, nil); err != nil {
			return err
		}
	}
	return m.dropNodes(oldNodes(nodes, disk)...)
}

// moveTo is steps 2 to 5. After an error the disk still uses its old nodes.
func (m *Machine) moveTo(ctx context.Context, disk, gen int, sizeBytes uint64) error {
	server, err := parseURI(m.spec.Disks[disk].URI)
	if err != nil {
		return err
	}
	nbd, raw := nbdNode(disk, gen), rawNode(disk, gen)
	if err := m.do(ctx, "blockdev-add", nbdBlockdev(nbd, server, openSec), nil); err != nil {
		return err
	}
	nodes, err := m.blockNodes(ctx)
	if err != nil {
		return err
	}
	if nodes[nbd] < sizeBytes {
		return status.Errorf(status.Conflict, "disk %d of VM %s: its server exports %d bytes, not %d; grow the volume first", disk, m.spec.Name, nodes[nbd], sizeBytes)
	}
	if err := m.do(ctx, "blockdev-add", rawBlockdev(raw, nbd), nil); err != nil {
		return err
	}
	return m.do(ctx, "qom-set", object{"path": qdevOf(disk), "property": "drive", "value": raw}, nil)
}

// dropNodes deletes nodes; those in use stay.
func (m *Machine) dropNodes(nodes ...string) error {
	// Long enough for a hanging step 2 to be over.
	ctx, cancel := context.WithTimeout(m.ctx, 2*openSec*time.Second)
	defer cancel()
	var failed error
	for _, n := range nodes {
		err := m.do(ctx, "blockdev-del", object{"node-name": n}, nil)
		// Refused (Invalid): in use, or never opened. It does no harm there.
		if err != nil && !errors.Is(err, status.Invalid) {
			failed = errors.Join(failed, fmt.Errorf("drop the block node %s: %w", n, err))
		}
	}
	return failed
}

// oldNodes lists a disk's nodes, those on top first: they keep the others in
// use.
func oldNodes(nodes map[string]uint64, disk int) []string {
	var raws, nbds []string
	for n := range nodes {
		switch {
		case strings.HasPrefix(n, rawPrefix(disk)):
			raws = append(raws, n)
		case strings.HasPrefix(n, nbdPrefix(disk)):
			nbds = append(nbds, n)
		}
	}
	return append(raws, nbds...)
}

// blockNodes returns the size of every block node by name.
func (m *Machine) blockNodes(ctx context.Context) (map[string]uint64, error) {
	var list []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size uint64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := m.do(ctx, "query-named-block-nodes", object{"flat": true}, &list); err != nil {
		return nil, err
	}
	nodes := map[string]uint64{}
	for _, n := range list {
		nodes[n.Name] = n.Image.Size
	}
	return nodes, nil
}

// nextGen is above every generation of the disk's nodes in sight.
func nextGen(nodes map[string]uint64, disk int) int {
	next := 0
	for n := range nodes {
		for _, prefix := range []string{rawPrefix(disk), nbdPrefix(disk)} {
			g, ok := strings.CutPrefix(n, prefix)
			if !ok {
				continue
			}
			if gen, err := strconv.Atoi(g); err == nil && gen >= next {
				next = gen + 1
			}
		}
	}
	return next
}
