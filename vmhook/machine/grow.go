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

// Growing a disk online, and replacing a dead NBD node, are one sequence,
// because an NBD node keeps the size it was opened with:
//
//	1 find the nodes of this disk             query-named-block-nodes
//	2 open the export once more               blockdev-add      diskN-nbdG+1
//	3 check that the server has the new size
//	4 move the raw node onto the new node     blockdev-reopen   diskN
//	5 tell the guest the size                 block_resize      diskN
//	6 drop the old nodes                      blockdev-del      diskN-nbdG
//
// Which generation is in use is not remembered anywhere: a node in use cannot
// be dropped, so step 6 drops what it can, and a sequence cut short by a crash
// of the host process is cleaned up by the next one.

// replaceTimeout bounds the sequence when the caller's context does not; a
// server that accepts and then says nothing would hold QEMU up for ever.
const replaceTimeout = 10 * time.Second

// Grow makes the guest see that disk (an index into Spec.Disks) has sizeBytes
// now. The disk's server must export that size already.
func (m *Machine) Grow(ctx context.Context, disk int, sizeBytes uint64) error {
	if disk < 0 || disk >= len(m.spec.Disks) {
		return status.Errorf(status.Invalid, "VM %s has no disk %d", m.spec.Name, disk)
	}
	if sizeBytes == 0 || sizeBytes%512 != 0 {
		return status.Errorf(status.Invalid, "disk %d of VM %s: size %d is no multiple of 512 bytes", disk, m.spec.Name, sizeBytes)
	}
	m.ops.Lock()
	defer m.ops.Unlock()
	return m.replaceNode(ctx, disk, sizeBytes)
}

// SizeBytes returns the size the guest sees of a disk.
func (m *Machine) SizeBytes(ctx context.Context, disk int) (uint64, error) {
	nodes, err := m.blockNodes(ctx)
	if err != nil {
		return 0, err
	}
	size, ok := nodes[rawNode(disk)]
	if !ok {
		return 0, status.Errorf(status.NotFound, "VM %s has no disk %d", m.spec.Name, disk)
	}
	return size, nil
}

// replaceNode runs the sequence; sizeBytes 0 keeps the size. Called with ops
// held.
func (m *Machine) replaceNode(ctx context.Context, disk int, sizeBytes uint64) error {
	ctx, cancel := context.WithTimeout(ctx, replaceTimeout)
	defer cancel()
	nodes, err := m.blockNodes(ctx)
	if err != nil {
		return err
	}
	now := nodes[rawNode(disk)]
	if sizeBytes == now {
		return nil // asked twice
	}
	if sizeBytes == 0 {
		sizeBytes = now
	}
	if sizeBytes < now {
		return status.Errorf(status.Invalid, "disk %d of VM %s has %d bytes; a running guest's disk cannot shrink to %d", disk, m.spec.Name, now, sizeBytes)
	}
	node := nbdNode(disk, nextGen(nodes, disk))
	if err := m.openNode(ctx, disk, node, sizeBytes); err != nil {
		return errors.Join(err, m.dropNodes(disk, node, nodes))
	}
	if sizeBytes != now {
		if err := m.do(ctx, "block_resize", object{"node-name": rawNode(disk), "size": sizeBytes}, nil); err != nil {
			return err
		}
	}
	return m.dropNodes(disk, "", nodes)
}

// openNode is steps 2 to 4. After an error the disk still uses its old node.
func (m *Machine) openNode(ctx context.Context, disk int, node string, sizeBytes uint64) error {
	server, err := parseURI(m.spec.Disks[disk].URI)
	if err != nil {
		return err
	}
	if err := m.do(ctx, "blockdev-add", nbdBlockdev(node, server), nil); err != nil {
		if errors.Is(err, status.Unknown) {
			free, cancel := context.WithTimeout(m.ctx, hangTimeout)
			defer cancel()
			err = errors.Join(err, m.yank(free, node))
		}
		return err
	}
	nodes, err := m.blockNodes(ctx)
	if err != nil {
		return err
	}
	if nodes[node] < sizeBytes {
		return status.Errorf(status.Conflict, "disk %d of VM %s: its server exports %d bytes, not %d; grow the volume first", disk, m.spec.Name, nodes[node], sizeBytes)
	}
	return m.do(ctx, "blockdev-reopen", object{"options": []any{rawBlockdev(disk, node)}}, nil)
}

// dropNodes deletes the given node, or every node of the disk in nodes.
// Those in use stay.
func (m *Machine) dropNodes(disk int, node string, nodes map[string]uint64) error {
	ctx, cancel := context.WithTimeout(m.ctx, hangTimeout)
	defer cancel()
	drop := []string{node}
	if node == "" {
		drop = nil
		for n := range nodes {
			if strings.HasPrefix(n, nbdPrefix(disk)) {
				drop = append(drop, n)
			}
		}
	}
	var failed error
	for _, n := range drop {
		err := m.do(ctx, "blockdev-del", object{"node-name": n}, nil)
		// Refused (Invalid): in use, or never opened. It does no harm there.
		if err != nil && !errors.Is(err, status.Invalid) {
			failed = errors.Join(failed, fmt.Errorf("drop the old connection of disk %d: %w", disk, err))
		}
	}
	return failed
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

// nextGen is above every generation of the disk's NBD node in sight.
func nextGen(nodes map[string]uint64, disk int) int {
	next := 0
	for n := range nodes {
		if g, ok := strings.CutPrefix(n, nbdPrefix(disk)); ok {
			if gen, err := strconv.Atoi(g); err == nil && gen >= next {
				next = gen + 1
			}
		}
	}
	return next
}
